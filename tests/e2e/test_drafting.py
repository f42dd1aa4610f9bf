"""A real server that drafts: the same tokens, in fewer steps where the text repeats itself."""

PROMPT = [700, 701, 702, 703] * 20


def test_a_repetitive_stream_takes_fewer_steps_for_the_same_tokens(start) -> None:
    answers, steps = [], []
    for flags in ((), ("--draft_ngram", "6")):
        server = start(*flags)
        for inputs in (PROMPT, [1, 2, 3], PROMPT[:30]):
            reply = server.generate(inputs, max_new_tokens=60, ignore_eos=True, return_details=True)
            assert reply["count_output_tokens"] == 60
            answers.append([token["id"] for token in reply["tokens"]])
        steps.append(server.metric("batch_size_count", 'phase="decode"'))
    assert answers[:3] == answers[3:]
    # A random model repeats one token before long.
    assert steps[1] < 0.6 * steps[0], steps
