"""Shares: every row and column belongs to somebody, and what cannot be cut is refused with what can."""

import msgspec
import pytest

from lightllm.distributed.shares import INNER, KV, VOCAB, Q, share_out
from lightllm.errors import ConfigError
from tests.fakes import SMOLLM2


def shares(size, blocks=None, **changes):
    config = msgspec.structs.replace(SMOLLM2, **changes)
    return [share_out(config, blocks or {}, rank, size) for rank in range(size)]


def covered(parts, axis):
    return [index for part in parts for index in part.ranges[axis]]


@pytest.mark.parametrize("size", range(1, 10))
@pytest.mark.parametrize("num_kv_heads", [1, 3, 9])
def test_everything_belongs_to_somebody(size, num_kv_heads):
    parts = shares(size, num_key_value_heads=num_kv_heads)
    for axis in (Q, INNER, VOCAB):
        assert covered(parts, axis) == list(range(parts[0].lengths[axis]))
    assert set(covered(parts, KV)) == set(range(num_kv_heads * 64))
    assert sum(parts[0].vocab_sizes) == 49152
    for part in parts:
        config = part.config
        assert config.num_attention_heads % config.num_key_value_heads == 0
        assert len(part.ranges[Q]) == config.num_attention_heads * 64
        assert len(part.ranges[KV]) == config.num_key_value_heads * 64
        assert len(part.ranges[INNER]) == config.intermediate_size > 0
        # A rank's heads read the KV heads that it has.
        group = 9 // num_kv_heads
        heads = {head // 64 // group for head in part.ranges[Q]}
        assert heads == {row // 64 for row in part.ranges[KV]}


def test_heads_of_the_default_model():
    assert [part.config.num_attention_heads for part in shares(2)] == [6, 3]
    assert [part.config.num_key_value_heads for part in shares(2)] == [2, 1]
    assert [part.config.num_attention_heads for part in shares(3)] == [3, 3, 3]
    assert [part.config.num_attention_heads for part in shares(4)] == [2, 1, 3, 3]
    assert [part.config.num_key_value_heads for part in shares(4)] == [1, 1, 1, 1]


def test_inner_size_is_cut_on_the_borders_of_blocks():
    assert [len(part.ranges[INNER]) for part in shares(4, {INNER: 256})] == [512, 512, 256, 256]
    assert [len(part.ranges[INNER]) for part in shares(5, intermediate_size=170)] == [32, 32, 32, 32, 42]
    assert [len(part.ranges[INNER]) for part in shares(2, intermediate_size=7)] == [4, 3]


@pytest.mark.parametrize(
    ("size", "blocks", "words"),
    [
        (10, {}, ["--tp 10", "--model_dir", "9 heads", "1, 2, 3, 4, 5, 6, 7, 8, 9"]),
        (7, {INNER: 256}, ["--tp 7", "inner size 1536", "blocks of 256", "are 1, 2, 3, 4, 5, 6"]),
        (4, {Q: 192}, ["--tp 4", "blocks of 192 columns", "are 1, 2, 3"]),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_can(size, blocks, words):
    with pytest.raises(ConfigError) as caught:
        shares(size, blocks)
    assert caught.value.exit_code == 2
    assert all(word in caught.value.message for word in words), caught.value.message
