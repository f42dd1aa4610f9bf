"""Turn a weight source into the weights that a model asked for: one loader for all models.

Reads and unpacks with several threads; torch releases the interpreter while it copies. Knows specs, never
models.
"""

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import torch
from torch import Tensor

from lightllm.errors import ModelLoadError
from lightllm.layers.linear import LinearMethod, stack_rows, unpack_tiles
from lightllm.layers.ops import Ops
from lightllm.models.base import LinearSpec, VectorSpec, Weights, WeightSpecs
from lightllm.weights.base import PackedTensor, WeightSource

Progress = Callable[[int, int], None]
"""Told how many weights are loaded, and how many there are."""


def load_weights(
    specs: WeightSpecs,
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    num_threads: int,
    progress: Progress,
    packed: bool,
) -> Weights:
    """Load everything in `specs`.

    Args:
        dtype: to compute in.
        device: where dense weights go; packed ones stay on the CPU.
        ops: makes the linears.
        num_threads: that read at once.
        progress: called in this thread after each weight.
        packed: keep quantised linears as they are, instead of unpacking them into `dtype`.

    Raises:
        ModelLoadError: a tensor is missing, or has another shape than the config says.
    """
    loader = _Loader(source, dtype, device, ops, packed)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="load")
    try:
        linears = {name: pool.submit(loader.linear, spec) for name, spec in specs.linears.items()}
        vectors = {name: pool.submit(loader.vector, spec) for name, spec in specs.vectors.items()}
        futures: list[Future[Any]] = [*linears.values(), *vectors.values()]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            progress(done, len(futures))
    finally:
        pool.shutdown(cancel_futures=True)
    return Weights(
        {name: future.result() for name, future in linears.items()},
        {name: future.result() for name, future in vectors.items()},
    )


def unused_names(specs: WeightSpecs, source: WeightSource) -> list[str]:
    """Return the names in the source that no spec asks for."""
    used = specs.tensor_shapes()
    return [name for name in source.names() if name not in used]


class _Loader:
    """Loads single weights; its methods run in several threads at once."""

    def __init__(
        self, source: WeightSource, dtype: torch.dtype, device: torch.device, ops: Ops, packed: bool
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.device = device
        self.ops = ops
        self.packed = packed

    def linear(self, spec: LinearSpec) -> LinearMethod:
        parts = [
            _reordered(self._read(f"{part}.weight", (rows, spec.in_features)), spec.row_orders.get(part))
            for part, rows in spec.parts.items()
        ]
        bias = self._bias(spec) if spec.has_bias else None
        packed_parts = [part for part in parts if isinstance(part, PackedTensor)]
        if self.packed and len(packed_parts) == len(parts):
            return self.ops.packed_linear(stack_rows(packed_parts), bias, self.dtype)
        weight = self._empty(sum(spec.parts.values()), spec.in_features)
        _fill(weight, itertools.chain.from_iterable(map(_blocks, parts)))
        return self.ops.dense_linear(weight, bias)

    def vector(self, spec: VectorSpec) -> Tensor:
        read = self._read(spec.name, (spec.size,))  # before the allocation: the size may be wrong
        vector = self._empty(spec.size, dtype=torch.float32 if spec.offset else self.dtype)
        _fill(vector, _blocks(read))
        return vector.add_(spec.offset) if spec.offset else vector

    def _bias(self, spec: LinearSpec) -> Tensor:
        parts = [
            _reordered(self._read(f"{part}.bias", (rows,)), spec.row_orders.get(part))
            for part, rows in spec.parts.items()
        ]
        bias = self._empty(sum(spec.parts.values()))
        _fill(bias, itertools.chain.from_iterable(map(_blocks, parts)))
        return bias

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def _read(self, name: str, expected: tuple[int, ...]) -> Tensor | PackedTensor:
        # The source names the file where a tensor is missing from it.
        got = tuple(self.source.shape(name))
        if got != expected:
            raise ModelLoadError(
                f"{self.source.file(name)}: tensor {name}: got shape {list(got)}, "
                f"expected {list(expected)} by the model's config"
            )
        return self.source.load(name)


def _reordered(tensor: Tensor | PackedTensor, order: Tensor | None) -> Tensor | PackedTensor:
    if order is None:
        return tensor
    if isinstance(tensor, PackedTensor):
        return PackedTensor(tensor.type, tensor.data[order], tensor.shape)
    return tensor[order]


def _blocks(tensor: Tensor | PackedTensor) -> Iterable[Tensor]:
    return unpack_tiles(tensor) if isinstance(tensor, PackedTensor) else (tensor,)


def _fill(target: Tensor, blocks: Iterable[Tensor]) -> None:
    """Copy blocks of rows into the target, one below the other, converting them to its dtype."""
    start = 0
    for block in blocks:
        target[start : start + block.shape[0]].copy_(block)
        start += block.shape[0]
