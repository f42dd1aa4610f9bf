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

from lightllm.distributed.collectives import Collectives
from lightllm.distributed.shares import VOCAB, Shares
from lightllm.errors import ModelLoadError
from lightllm.layers.linear import LinearMethod, stack_rows, unpack_tiles
from lightllm.layers.ops import Ops
from lightllm.layers.parallel_linear import ReducedLinear, VocabLinear
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
    shares: Shares,
    collectives: Collectives,
) -> Weights:
    """Load everything in `specs`, or this rank's part of it.

    Args:
        dtype: to compute in.
        device: where dense weights go; packed ones stay on the CPU.
        ops: makes the linears.
        num_threads: that read at once.
        progress: called in this thread after each weight.
        packed: keep quantised linears as they are, instead of unpacking them into `dtype`.
        shares: this rank's part.
        collectives: what linears get that are shared by several ranks.

    Raises:
        ModelLoadError: a tensor is missing, or has another shape than the config says.
    """
    loader = _Loader(source, dtype, device, ops, packed, shares, collectives)
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


def column_blocks(specs: WeightSpecs, source: WeightSource) -> dict[str, int]:
    """Axis -> columns that the packed weights along it keep together."""
    blocks: dict[str, int] = {}
    for spec in specs.linears.values():
        if spec.column_axis:
            sizes = [source.block_size(f"{part}.weight") for part in spec.parts]
            blocks[spec.column_axis] = max(blocks.get(spec.column_axis, 1), *sizes)
    return blocks


def unused_names(specs: WeightSpecs, source: WeightSource) -> list[str]:
    """Return the names in the source that no spec asks for."""
    used = specs.tensor_shapes()
    return [name for name in source.names() if name not in used]


class _Loader:
    """Loads single weights; its methods run in several threads at once."""

    def __init__(
        self,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        packed: bool,
        shares: Shares,
        collectives: Collectives,
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.device = device
        self.ops = ops
        self.packed = packed
        self.shares = shares
        self.collectives = collectives

    def linear(self, spec: LinearSpec) -> LinearMethod:
        columns = self.shares.columns(spec.column_axis, spec.in_features)
        parts = list(self._parts(spec, "weight", columns))
        # Where the ranks' results are added up, one of them has the bias.
        bias = self._bias(spec) if spec.has_bias and not (spec.column_axis and self.shares.rank) else None
        return self._joined(spec, self._made(parts, bias, len(columns)))

    def _made(
        self, parts: list[Tensor | PackedTensor], bias: Tensor | None, num_columns: int
    ) -> LinearMethod:
        packed_parts = [part for part in parts if isinstance(part, PackedTensor)]
        if self.packed and len(packed_parts) == len(parts):
            return self.ops.packed_linear(stack_rows(packed_parts), bias, self.dtype)
        weight = self._empty(sum(part.shape[0] for part in parts), num_columns)
        _fill(weight, itertools.chain.from_iterable(map(_blocks, parts)))
        return self.ops.dense_linear(weight, bias)

    def _joined(self, spec: LinearSpec, part: LinearMethod) -> LinearMethod:
        """What computes the whole linear from the parts of all ranks; one rank has it already."""
        if self.shares.size == 1:
            return part
        if spec.column_axis:
            return ReducedLinear(part, self.collectives)
        if spec.row_axes == (VOCAB,):
            return VocabLinear(part, self.shares.ranges[VOCAB], self.shares.vocab_sizes, self.collectives)
        return part

    def _parts(self, spec: LinearSpec, kind: str, columns: range | None) -> Iterable[Tensor | PackedTensor]:
        """This rank's rows of all parts, in order; `columns` is None for biases."""
        wanted = self.shares.rows(spec.row_axes, sum(spec.parts.values()))
        start = 0
        for part, num_rows in spec.parts.items():
            own = _within(wanted, start, start + num_rows)
            shape = (num_rows,) if columns is None else (num_rows, spec.in_features)
            yield from self._rows(f"{part}.{kind}", shape, own, columns, spec.row_orders.get(part))
            start += num_rows

    def _rows(
        self, name: str, shape: tuple[int, ...], own: list[range], columns: range | None, order: Tensor | None
    ) -> Iterable[Tensor | PackedTensor]:
        if order is None:
            for rows in own:
                yield self._read(name, shape, rows, columns)
        elif own:
            indices = torch.cat([order[rows.start : rows.stop] for rows in own])
            first, last = int(indices.min()), int(indices.max()) + 1
            yield _reordered(self._read(name, shape, range(first, last), columns), indices - first)

    def vector(self, spec: VectorSpec) -> Tensor:
        read = self._read(
            spec.name, (spec.size,), range(spec.size), None
        )  # before the allocation: the size may be wrong
        vector = self._empty(spec.size, dtype=torch.float32 if spec.offset else self.dtype)
        _fill(vector, _blocks(read))
        return vector.add_(spec.offset) if spec.offset else vector

    def _bias(self, spec: LinearSpec) -> Tensor:
        parts = list(self._parts(spec, "bias", None))
        bias = self._empty(sum(part.shape[0] for part in parts))
        _fill(bias, itertools.chain.from_iterable(map(_blocks, parts)))
        return bias

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def _read(
        self, name: str, expected: tuple[int, ...], rows: range, columns: range | None
    ) -> Tensor | PackedTensor:
        # The source names the file where a tensor is missing from it.
        got = tuple(self.source.shape(name))
        if got != expected:
            raise ModelLoadError(
                f"{self.source.file(name)}: tensor {name}: got shape {list(got)}, "
                f"expected {list(expected)} by the model's config"
            )
        if len(rows) == expected[0] and (columns is None or len(columns) == expected[1]):
            return self.source.load(name)
        return self.source.load_part(name, rows, columns)


def _within(wanted: list[range], start: int, stop: int) -> list[range]:
    """Those of the rows that lie in [start, stop), counted from there; neighbours as one."""
    found: list[range] = []
    for rows in wanted:
        own = range(max(rows.start, start) - start, min(rows.stop, stop) - start)
        if not own:
            continue
        if found and found[-1].stop == own.start:
            own = range(found.pop().start, own.stop)
        found.append(own)
    return found


def _reordered(tensor: Tensor | PackedTensor, order: Tensor) -> Tensor | PackedTensor:
    if isinstance(tensor, PackedTensor):
        return PackedTensor(tensor.type, tensor.data[order], (len(order), tensor.shape[1]))
    return tensor[order]


def _blocks(tensor: Tensor | PackedTensor) -> Iterable[Tensor]:
    return unpack_tiles(tensor) if isinstance(tensor, PackedTensor) else (tensor,)


def _fill(target: Tensor, blocks: Iterable[Tensor]) -> None:
    """Copy blocks of rows into the target, one below the other, converting them to its dtype."""
    start = 0
    for block in blocks:
        target[start : start + block.shape[0]].copy_(block)
        start += block.shape[0]
