"""Which part of a model a rank holds: a range of every axis along which weights are cut.

Pure arithmetic on a model's dimensions. Knows axes by name, never weights, files or torch; models say which
of their weights lie along which axis (LinearSpec). Runs in the worker.

    axis   | what is cut                          | whole units
    -------|--------------------------------------|------------------------------------------------
    q      | heads of q, and the columns of o     | heads of one KV head, while there are such
    kv     | heads of k and v                     | KV heads; the same on several ranks if there are fewer
    inner  | rows of gate and up, columns of down | blocks in which a packed weight stores its columns
    vocab  | rows of the embedding and the head   | 64 tokens
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from lightllm.errors import ConfigError
from lightllm.model_config import ModelConfig

Q, KV, INNER, VOCAB = "q", "kv", "inner", "vocab"
# Where the weight itself allows any border, a matrix product prefers round numbers.
INNER_UNIT, VOCAB_UNIT = 32, 64


@dataclass(frozen=True, slots=True)
class Shares:
    """What one rank of `size` holds.

    Attributes:
        config: the model as this rank computes it: its own heads and inner size; all else is the model's.
        ranges: axis -> [start, stop) of its rows or columns.
        lengths: axis -> rows or columns of the whole.
        vocab_sizes: rows of the vocabulary that each rank holds, in the order of ranks.
    """

    rank: int
    size: int
    config: ModelConfig
    ranges: Mapping[str, range]
    lengths: Mapping[str, int]
    vocab_sizes: tuple[int, ...]

    def rows(self, axes: tuple[str, ...], total: int) -> list[range]:
        """The rows of a fused weight that lie along these axes, one below the other; all `total` without."""
        if not axes:
            return [range(total)]
        found, start = [], 0
        for axis in axes:
            own = self.ranges[axis]
            found.append(range(start + own.start, start + own.stop))
            start += self.lengths[axis]
        return found

    def columns(self, axis: str, total: int) -> range:
        """The columns of a weight along this axis; all `total` without one."""
        return self.ranges[axis] if axis else range(total)


def share_out(config: ModelConfig, blocks: Mapping[str, int], rank: int, size: int) -> Shares:
    """Work out the part of a rank.

    Args:
        config: the whole model.
        blocks: axis -> columns that a packed weight along it keeps together; 1 where it says nothing.

    Raises:
        ConfigError: the model cannot be spread over so many ranks; the message lists the numbers that work.
    """
    problem = obstacle(config, blocks, size)
    if problem is not None:
        usable = [n for n in range(1, config.num_attention_heads + 1) if obstacle(config, blocks, n) is None]
        raise ConfigError(
            f"--tp {size} and --model_dir: {problem}; values of --tp that work with this model are "
            f"{', '.join(map(str, usable))}"
        )
    q, kv = _heads(config, rank, size)
    lengths = _lengths(config)
    vocab = _split(config.vocab_size, VOCAB_UNIT, size)
    inner = _inner(config, blocks, size)[rank]
    head_dim = config.head_dim
    return Shares(
        rank=rank,
        size=size,
        config=msgspec.structs.replace(
            config, num_attention_heads=len(q), num_key_value_heads=len(kv), intermediate_size=len(inner)
        ),
        ranges={
            Q: range(q.start * head_dim, q.stop * head_dim),
            KV: range(kv.start * head_dim, kv.stop * head_dim),
            INNER: inner,
            VOCAB: vocab[rank],
        },
        lengths=lengths,
        vocab_sizes=tuple(len(part) for part in vocab),
    )


def kv_head_ranges(config: ModelConfig, size: int) -> tuple[range, ...]:
    """The KV heads that each of `size` ranks holds; several hold the same one if there are fewer heads.

    Raises:
        ConfigError: the heads cannot be spread over so many ranks.
    """
    if not 1 <= size <= config.num_attention_heads:
        raise ConfigError(f"{config.num_attention_heads} heads cannot be spread over {size} ranks")
    return tuple(_heads(config, rank, size)[1] for rank in range(size))


def obstacle(config: ModelConfig, blocks: Mapping[str, int], size: int) -> str | None:
    """Why the model cannot be spread over `size` ranks; None if it can."""
    heads = config.num_attention_heads
    if size > heads:
        return f"its {heads} heads cannot be spread over {size} ranks"
    block = blocks.get(Q, 1)
    for rank in range(size):
        q, _ = _heads(config, rank, size)
        if q.start * config.head_dim % block or q.stop * config.head_dim % block:
            return (
                f"its attention output is stored in blocks of {block} columns, and {len(q)} of {heads} heads "
                f"of {config.head_dim} do not fill whole ones"
            )
    if not all(_inner(config, blocks, size)):
        block = blocks.get(INNER, 1)
        return f"its inner size {config.intermediate_size} has too few blocks of {block} for {size} ranks"
    return None


def _lengths(config: ModelConfig) -> dict[str, int]:
    return {
        Q: config.num_attention_heads * config.head_dim,
        KV: config.num_key_value_heads * config.head_dim,
        INNER: config.intermediate_size,
        VOCAB: config.vocab_size,
    }


def _heads(config: ModelConfig, rank: int, size: int) -> tuple[range, range]:
    """Heads of q and KV heads of a rank; its share of q per KV head is the same for all of its KV heads."""
    num_kv = config.num_key_value_heads
    group = config.num_attention_heads // num_kv
    if size <= num_kv:
        kv = _split(num_kv, 1, size)[rank]
        return range(kv.start * group, kv.stop * group), kv
    for head, ranks in enumerate(_split(size, 1, num_kv)):
        if rank in ranks:
            own = _split(group, 1, len(ranks))[rank - ranks.start]
            return range(head * group + own.start, head * group + own.stop), range(head, head + 1)
    raise AssertionError(f"rank {rank} of {size} has no KV head")


def _inner(config: ModelConfig, blocks: Mapping[str, int], size: int) -> list[range]:
    block = blocks.get(INNER, 1)
    return _split(config.intermediate_size, block if block > 1 else INNER_UNIT, size, is_fixed=block > 1)


def _split(length: int, unit: int, size: int, *, is_fixed: bool = False) -> list[range]:
    """Cut `length` into `size` neighbouring parts of whole units, as equal as can be, the first the larger.

    What is left of the last unit goes to the last part. A unit that is only preferred gives way to single
    elements where there would be fewer units than parts.
    """
    if not is_fixed and length // unit < size:
        unit = 1
    units, extra = divmod(length // unit, size)
    borders = [0]
    for part in range(size):
        borders.append(borders[-1] + (units + (part < extra)) * unit)
    borders[-1] = length
    return [range(a, b) for a, b in itertools.pairwise(borders)]
