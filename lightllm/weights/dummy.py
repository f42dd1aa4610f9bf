"""DummySource: seeded random weights of a model that is known by its config alone.

For benchmarks and tests at real shapes. A tensor depends on seed, name and shape only, so ranks, threads and
runs agree. Which tensors a model has, models/ knows.
"""

import zlib
from collections.abc import Iterable, Mapping

import torch

from lightllm.errors import ModelLoadError
from lightllm.weights.base import PackedTensor

STD = 0.02


class DummySource:
    """A `WeightSource` of random tensors: norms one, biases zero, the rest normal.

    Args:
        shapes: HF name -> shape of every tensor.
        dtype: of all of them, by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str, seed: int = 0) -> None:
        self.seed = seed
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._shapes = shapes

    def names(self) -> Iterable[str]:
        """HF names of all tensors."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if name not in self._shapes:
            raise ModelLoadError(f"dummy weights: the config asks for no tensor {name}")
        return self._shapes[name]

    def file(self, name: str) -> str:
        """There is none."""
        return "dummy weights"

    def block_size(self, name: str) -> int:
        """They are never quantised."""
        return 1

    def load_part(self, name: str, rows: range, columns: range | None) -> torch.Tensor | PackedTensor:
        """Make the whole tensor, so that ranks agree, and take a part of it."""
        tensor = self.load(name)
        assert isinstance(tensor, torch.Tensor), "dummy weights are not quantised"
        tensor = tensor[rows.start : rows.stop]
        return tensor if columns is None else tensor[:, columns.start : columns.stop]

    def load(self, name: str) -> torch.Tensor | PackedTensor:
        """Make one tensor; the same call always gives the same values."""
        shape = self.shape(name)
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self.dtype)
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self.dtype)
        # torch's CPU generator uses only 32 bits of a seed, so seed and name are mixed into these.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{name}".encode()))
        return torch.empty(shape).normal_(std=STD, generator=generator).to(self.dtype)
