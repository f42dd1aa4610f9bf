"""Which bytes move, and in which pieces: the KV pool as rows of bytes, ranks' heads, blocks, digest.

A block is the KV of some consecutive tokens: the keys of all of them layer by layer, then the values, that is
[2 * num_layers, num_tokens, row_bytes]. Slots are gathered into a block and scattered from it; they never
travel one by one. Knows neither sockets nor threads.
"""

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from lightllm.device.kv_pool import KVPool
from lightllm.messages import KVLayout
from lightllm.packed_ints import Ints, pack


class KVRows(ABC):
    """The memory of a KV pool, or some heads of it: one row of bytes for each slot and tensor.

    Any thread may use it.

    Args:
        pool: whose memory it is.
        first_head: the model's KV head that is the pool's first.
        heads: the model's KV heads whose rows these are; all of the pool's if left out.

    Attributes:
        row_bytes: keys, or values, of one token in one layer.
        token_bytes: KV of one token.
        num_tensors: rows that one token has: layers, for keys and values.
        device: where the pool is.
    """

    def __init__(self, pool: KVPool, first_head: int = 0, heads: range | None = None) -> None:
        self.pool = pool
        self.pool_heads = range(first_head, first_head + pool.num_kv_heads)
        self.heads = self.pool_heads if heads is None else heads
        self.head_bytes = pool.head_dim * pool.k[0].element_size()
        self.row_bytes = len(self.heads) * self.head_bytes
        self.num_tensors = 2 * len(pool.k)
        self.token_bytes = self.row_bytes * self.num_tensors
        self.device: torch.device = pool.k[0].device

    @property
    def row_range(self) -> tuple[int, int]:
        """First and last byte of these rows in those of the pool."""
        first = (self.heads.start - self.pool_heads.start) * self.head_bytes
        return first, first + self.row_bytes

    def part(self, heads: range) -> "KVRows":
        """The rows of some of these heads."""
        return self if heads == self.heads else self._part(heads)

    @abstractmethod
    def _part(self, heads: range) -> "KVRows":
        """The same, of other heads than these."""

    @abstractmethod
    def pack(self, slots: np.ndarray, block: Tensor) -> None:
        """Gather slots into the beginning of a block; returns when that is done.

        Args:
            slots: [n] int64, at least one.
            block: uint8, contiguous, at least n * token_bytes, on the host or on `device`.
        """

    @abstractmethod
    def unpack(self, slots: np.ndarray, block: Tensor) -> None:
        """Scatter a block of exactly the size of these slots; returns when that is done."""

    def pin(self, memory: Tensor) -> None:
        """Make memory of the host that is not from `host_memory` as fast to copy, until `unpin`.

        Raises:
            OSError: the system does not allow it.
        """
        return

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`."""
        return

    @abstractmethod
    def host_memory(self, size: int) -> Tensor:
        """New memory of the host for blocks, uint8 [size], of the kind that is fast to copy to and from."""


class HostRows(KVRows):
    """The rows of a pool on a CPU."""

    def __init__(self, pool: KVPool, first_head: int = 0, heads: range | None = None) -> None:
        super().__init__(pool, first_head, heads)
        # A row is one item of a type without structure: numpy then moves it in one piece.
        self._row_type = np.dtype((np.void, self.row_bytes))
        first, stop = self.row_range
        self._arrays = [
            tensor.view(torch.uint8)
            .numpy()
            .reshape(pool.num_slots, -1)[:, first:stop]
            .view(self._row_type)[:, 0]
            for tensor in (*pool.k, *pool.v)
        ]

    def _part(self, heads: range) -> "HostRows":
        return HostRows(self.pool, self.pool_heads.start, heads)

    def pack(self, slots: np.ndarray, block: Tensor) -> None:
        for array, piece in zip(self._arrays, self._pieces(block, len(slots)), strict=True):
            if array.flags.c_contiguous:
                np.take(array, slots, out=piece, mode="clip")  # the other modes copy `out` first
            else:
                piece[:] = array[slots]  # `take` would copy all of it first

    def unpack(self, slots: np.ndarray, block: Tensor) -> None:
        for array, piece in zip(self._arrays, self._pieces(block, len(slots)), strict=True):
            array[slots] = piece

    def host_memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def _pieces(self, block: Tensor, num_tokens: int) -> np.ndarray:
        used = block.numpy()[: num_tokens * self.token_bytes]
        return used.view(self._row_type).reshape(len(self._arrays), num_tokens)


class Part(NamedTuple):
    """What one rank of the sender has for one rank of the receiver; heads are numbered as the model's."""

    source_rank: int
    target_rank: int
    heads: range


def parts(sources: Sequence[range], targets: Sequence[range]) -> list[Part]:
    """Who sends which KV heads to whom, so that each target gets each of its heads once.

    A head that several sources hold comes from each of them in turn; equal ranks have to do with each other
    alone.

    Args:
        sources, targets: the heads of each rank; the sources' cover the targets'.
    """
    found = []
    for rank, heads in enumerate(targets):
        chosen = []
        for head in heads:
            holders = [source for source, own in enumerate(sources) if head in own]
            wanting = [target for target, own in enumerate(targets) if head in own]
            chosen.append(holders[wanting.index(rank) % len(holders)])
        for source, run in itertools.groupby(zip(chosen, heads, strict=True), key=lambda pair: pair[0]):
            of_source = [head for _, head in run]
            found.append(Part(source, rank, range(of_source[0], of_source[-1] + 1)))
    return found


def blocks(start: int, slots: Ints, tokens_per_block: int) -> Iterator[tuple[int, np.ndarray]]:
    """Cut tokens into blocks: the first position of each, and its slots."""
    for offset in range(0, len(slots), tokens_per_block):
        yield start + offset, np.array(slots[offset : offset + tokens_per_block], dtype=np.int64)


def digest(layout: KVLayout, heads: range, token_ids: Ints, chunks: list[tuple[int, int]]) -> bytes:
    """What both ends must agree on in the end: which tokens, of which heads, in which blocks in this order.

    Args:
        layout: of either node; their numbers of ranks may differ.
        chunks: (first position, number of tokens) of each block.
    """
    joint = msgspec.structs.replace(layout, tp_size=0)
    return hashlib.sha256(
        msgspec.msgpack.encode([joint, heads.start, heads.stop, pack(token_ids).tobytes(), chunks])
    ).digest()
