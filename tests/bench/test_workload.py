"""Prompts have exactly the length asked for, whatever the tokenizer does between decoding and encoding."""

import asyncio
import random
import statistics

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lightllm.bench.http_client import HttpClient, parse_url
from lightllm.bench.workload import (
    LocalCodec,
    ServerCodec,
    WorkloadError,
    exact_prompt,
    make_jobs,
    output_lengths,
)
from tests.bench.fake_server import TEMPLATE_TOKENS, FakeServer

TEXT = [
    "the quick brown fox jumps over the lazy dog and runs on to a house in the north of the country",
    "eine kleine Übung für Wörter mit Umlauten, \N{SNOWMAN} und \N{GRINNING FACE} und 12345 Zahlen",
    "def main(argv: list[str]) -> int:\n    return len(argv) + 2 ** 31\n\n\n",
]


class BPETokenizer:
    """A small byte-level BPE with a start token, like those of real models."""

    def __init__(self, *, has_prefix_space: bool) -> None:
        self.backend = Tokenizer(models.BPE())
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix_space)
        self.backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self.backend.train_from_iterator(TEXT, trainer)
        self.backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )

    @property
    def vocab_size(self):
        return self.backend.get_vocab_size()

    def encode(self, text, add_special_tokens=True):
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=True):
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages, **kwargs):
        assert kwargs == {"add_generation_prompt": True}
        return "".join(f"<s>{m['role']}\n{m['content'].strip()}</s>" for m in messages) + "<s>assistant\n"


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "prefix_space"])
def tokenizer(request):
    return BPETokenizer(has_prefix_space=request.param)


def make(codec, length, output_lens, seed=0):
    return asyncio.run(make_jobs(codec, length, output_lens, seed=seed, report=lambda num: None))


@pytest.mark.parametrize("length", [2, 3, 17, 64, 300])
def test_lengths_are_exact(tokenizer, length):
    jobs = make(LocalCodec(tokenizer, is_chat=False), length, [4] * 40)
    assert [len(tokenizer.encode(job.prompt)) for job in jobs] == [length] * 40
    assert [job.index for job in jobs] == list(range(40))


def test_chat_lengths_include_the_template(tokenizer):
    jobs = make(LocalCodec(tokenizer, is_chat=True), 60, [4] * 20)
    for job in jobs:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": job.prompt}], add_generation_prompt=True
        )
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 60


def test_seeds_decide(tokenizer):
    codec = LocalCodec(tokenizer, is_chat=False)
    first = make(codec, 30, [4] * 5)
    assert make(codec, 30, [4] * 5) == first
    assert make(codec, 30, [4] * 9)[:5] == first  # a longer run begins with the same prompts
    assert make(codec, 30, [4] * 5, seed=1) != first
    assert len({job.prompt for job in first}) == 5


def test_an_impossible_length_is_refused_in_words(tokenizer):
    codec = LocalCodec(tokenizer, is_chat=True)
    with pytest.raises(WorkloadError, match=r"--input_len: no prompt of exactly 3 tokens"):
        asyncio.run(exact_prompt(codec, random.Random(0), 3, (10, 400)))


@pytest.mark.parametrize(("is_chat", "overhead"), [(False, 1), (True, TEMPLATE_TOKENS)])
def test_the_server_counts_without_a_tokenizer(is_chat, overhead):
    async def run(server):
        client = HttpClient(parse_url(server.url))
        codec = ServerCodec(client, "", is_chat=is_chat)
        ids = await codec.id_range()
        jobs = await make_jobs(codec, 40, [4] * 10, seed=0, report=lambda num: None)
        client.close()
        return ids, jobs

    with FakeServer() as server:
        ids, jobs = asyncio.run(run(server))
    assert ids == (64, 256)
    assert [len(job.prompt.encode()) + overhead for job in jobs] == [40] * 10


def test_output_lengths_are_clipped_gaussians():
    lengths = output_lengths(20000, 128, seed=0, is_fixed=False)
    assert min(lengths) == 2
    assert max(lengths) == 256
    assert abs(statistics.mean(lengths) - 129) < 3
    # Mean and deviation are equal, so 15.9 % lie below zero and above twice the mean, and are clipped.
    assert 0.13 < lengths.count(2) / 20000 < 0.19
    assert 0.13 < lengths.count(256) / 20000 < 0.19
    assert output_lengths(50, 128, seed=0, is_fixed=False) == lengths[:50]
    assert output_lengths(50, 128, seed=1, is_fixed=False) != lengths[:50]


@pytest.mark.parametrize(("mean", "is_fixed"), [(77, True), (1, False)])
def test_fixed_output_lengths(mean, is_fixed):
    assert output_lengths(5, mean, seed=0, is_fixed=is_fixed) == [mean] * 5
