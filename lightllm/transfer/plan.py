"""Which bytes move, and in which pieces: the KV pool as rows of bytes, blocks of tokens, digest.

A block is the KV of some consecutive tokens: the keys of all of them layer by layer, then the values, that is
[2 * num_layers, num_tokens, row_bytes]. Slots are gathered into a block and scattered from it; they never
travel one by one. Knows neither sockets nor threads.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import msgspec
import numpy as np
import torch
from torch import Tensor

from lightllm.device.kv_pool import KVPool
from lightllm.messages import KVLayout


class KVRows(ABC):
    """The memory of a KV pool, one row of bytes for each slot and tensor. Any thread may use it.

    Attributes:
        pool: whose memory it is.
        row_bytes: keys, or values, of one token in one layer.
        token_bytes: KV of one token.
        device: where the pool is.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.row_bytes = pool.num_kv_heads * pool.head_dim * pool.k[0].element_size()
        self.token_bytes = self.row_bytes * 2 * len(pool.k)
        self.device: torch.device = pool.k[0].device

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

    def __init__(self, pool: KVPool) -> None:
        super().__init__(pool)
        # A row is one item of a type without structure: numpy then moves it in one piece.
        self._row_type = np.dtype((np.void, self.row_bytes))
        self._arrays = [
            tensor.view(torch.uint8)
            .numpy()
            .reshape(pool.num_slots, self.row_bytes)
            .view(self._row_type)[:, 0]
            for tensor in (*pool.k, *pool.v)
        ]

    def pack(self, slots: np.ndarray, block: Tensor) -> None:
        for array, piece in zip(self._arrays, self._pieces(block, len(slots)), strict=True):
            np.take(array, slots, out=piece, mode="clip")  # the other modes copy `out` first

    def unpack(self, slots: np.ndarray, block: Tensor) -> None:
        for array, piece in zip(self._arrays, self._pieces(block, len(slots)), strict=True):
            array[slots] = piece

    def host_memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def _pieces(self, block: Tensor, num_tokens: int) -> np.ndarray:
        used = block.numpy()[: num_tokens * self.token_bytes]
        return used.view(self._row_type).reshape(len(self._arrays), num_tokens)


def blocks(start: int, slots: list[int], tokens_per_block: int) -> Iterator[tuple[int, np.ndarray]]:
    """Cut tokens into blocks: the first position of each, and its slots."""
    for offset in range(0, len(slots), tokens_per_block):
        yield start + offset, np.array(slots[offset : offset + tokens_per_block], dtype=np.int64)


def digest(layout: KVLayout, token_ids: list[int], chunks: list[tuple[int, int]]) -> bytes:
    """What both ends must agree on in the end: which tokens, in which layout, in which blocks in this order.

    Args:
        chunks: (first position, number of tokens) of each block.
    """
    return hashlib.sha256(msgspec.msgpack.encode([layout, token_ids, chunks])).digest()
