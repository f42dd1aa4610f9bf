"""Which bytes move, and in which pieces: the KV pool as rows of bytes, blocks of tokens, digest, layouts.

A block is the KV of some consecutive tokens: for each layer the keys of all of them, then the values, that is
[2 * num_layers, num_tokens, row_bytes]. Slots are gathered into a block and scattered from it; they never
travel one by one. Knows neither sockets nor threads.
"""

import hashlib
from collections.abc import Iterator

import msgspec
import numpy as np
import torch

from lightllm.device.kv_pool import KVPool
from lightllm.messages import KVLayout

BLOCK_BYTES = 4 * 1024 * 1024
"""A block is no larger than this, unless one token is."""


class KVRows:
    """The memory of a KV pool on a CPU, one row of bytes for each slot and tensor.

    Attributes:
        token_bytes: KV of one token.
        tokens_per_block: at most so many tokens are moved at a time.
    """

    def __init__(self, pool: KVPool, block_bytes: int = BLOCK_BYTES) -> None:
        row_bytes = pool.num_kv_heads * pool.head_dim * pool.k[0].element_size()
        # A row is one item of a type without structure: numpy then moves it in one piece.
        self._row_type = np.dtype((np.void, row_bytes))
        tensors = [tensor for pair in zip(pool.k, pool.v, strict=True) for tensor in pair]
        self._arrays = [
            tensor.view(torch.uint8).numpy().reshape(pool.num_slots, row_bytes).view(self._row_type)[:, 0]
            for tensor in tensors
        ]
        self.token_bytes = row_bytes * len(self._arrays)
        self.tokens_per_block = max(1, block_bytes // self.token_bytes)
        self.block_bytes = self.tokens_per_block * self.token_bytes

    def pack(self, slots: np.ndarray, block: np.ndarray) -> int:
        """Gather slots into the beginning of a block.

        Args:
            slots: [n] int64, n <= tokens_per_block.
            block: uint8, at least n * token_bytes.
        Returns:
            How many bytes that are.
        """
        size = len(slots) * self.token_bytes
        for array, piece in zip(self._arrays, self._pieces(block[:size], len(slots)), strict=True):
            np.take(array, slots, out=piece, mode="clip")  # the other modes copy `out` first
        return size

    def unpack(self, slots: np.ndarray, block: np.ndarray) -> None:
        """Scatter a block of exactly the size of these slots."""
        for array, piece in zip(self._arrays, self._pieces(block, len(slots)), strict=True):
            array[slots] = piece

    def _pieces(self, block: np.ndarray, num_tokens: int) -> np.ndarray:
        return block.view(self._row_type).reshape(len(self._arrays), num_tokens)


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
