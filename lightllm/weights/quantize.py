"""QuantizedSource: float weights rounded to blocks of 4 or 8 bits while they are read (`--quant_type`).

The result has the form of a GGUF packing, so that whatever computes on quantised files computes on it. Knows
names and packings; which tensors are rounded to what is the caller's choice. Runs in the worker.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lightllm.errors import ConfigError, ModelLoadError
from lightllm.weights.base import PackedTensor, WeightSource
from lightllm.weights.codes import BLOCK, TILE_ELEMENTS, quantize4, quantize8
from lightllm.weights.gguf import BLOCK_LAYOUTS


class QuantizedSource:
    """A `WeightSource` that reads from another one and quantises some of its tensors.

    A tensor is rounded by tiles of rows, so that beside the packed result there is only what the source
    itself holds of it.

    Args:
        source: of float tensors.
        packings: tensor name -> a key of QUANTIZERS. Such a tensor has rows of a multiple of 32 columns.
        origin: the user's flag, for messages.
    """

    def __init__(self, source: WeightSource, packings: Mapping[str, str], origin: str) -> None:
        self._source = source
        self._packings = packings
        self._origin = origin

    def names(self) -> Iterable[str]:
        """Those of the source."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """As the source says."""
        return self._source.shape(name)

    def file(self, name: str) -> str:
        """As the source says."""
        return self._source.file(name)

    def block_size(self, name: str) -> int:
        """As the source says, or what is about to be made."""
        return BLOCK if name in self._packings else self._source.block_size(name)

    def load(self, name: str) -> Tensor | PackedTensor:
        """Read one tensor, and pack it if it has a packing.

        Raises:
            ConfigError: the source has it packed already.
            ModelLoadError: as the source, or its values have no scale in float16.
        """
        return self._packed(name, self._source.load(name))

    def load_part(self, name: str, rows: range, columns: range | None) -> Tensor | PackedTensor:
        """Read a part, of whole blocks of columns, and pack it as the whole would be.

        Raises:
            ConfigError, ModelLoadError: as `load`.
        """
        return self._packed(name, self._source.load_part(name, rows, columns))

    def _packed(self, name: str, tensor: Tensor | PackedTensor) -> Tensor | PackedTensor:
        kind = self._packings.get(name)
        if kind is None:
            return tensor
        if isinstance(tensor, PackedTensor):
            raise ConfigError(
                f"{self._origin}: {self._source.file(name)}: {name} is packed as {tensor.type} already, and "
                f"would lose by being rounded again; leave {self._origin.split()[0]} out to run the file as "
                "it is, or use a checkpoint of float weights"
            )
        packed = quantize(tensor, kind)
        if packed is None:
            raise ModelLoadError(
                f"{self._origin}: {self._source.file(name)}: tensor {name} holds values that are not finite "
                f"or beyond float16; leave {self._origin.split()[0]} out"
            )
        return packed


def quantize(weights: Tensor, kind: str) -> PackedTensor | None:
    """Round [rows, columns] of any float dtype; not modified.

    Args:
        kind: a key of QUANTIZERS.

    Returns:
        The packed tensor; None if a scale is not finite.
    """
    num_rows, num_columns = weights.shape
    layout = BLOCK_LAYOUTS[kind]
    data = torch.empty(num_rows, num_columns // BLOCK * layout.block_bytes, dtype=torch.uint8)
    step = max(1, TILE_ELEMENTS // num_columns)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        blocks = data[rows].view(-1, num_columns // BLOCK, layout.block_bytes)
        if not QUANTIZERS[kind](weights[rows].float().contiguous(), blocks):
            return None
    return PackedTensor(kind, data, (num_rows, num_columns))


def _q4_1(weights: Tensor, blocks: Tensor) -> bool:
    codes = quantize4(weights)
    blocks[..., :2], blocks[..., 2:4] = _bytes(codes.d), _bytes(codes.m)
    blocks[..., 4:] = codes.q.view(*blocks.shape[:2], -1)
    return bool(codes.d.isfinite().all() and codes.m.isfinite().all())


def _q8_0(weights: Tensor, blocks: Tensor) -> bool:
    codes = quantize8(weights)
    blocks[..., :2] = _bytes(codes.d)
    blocks[..., 2:] = codes.q.view(torch.uint8).view(*blocks.shape[:2], -1)
    return bool(codes.d.isfinite().all())


def _bytes(halves: Tensor) -> Tensor:
    """Float16 [rows, blocks] as [rows, blocks, 2] uint8."""
    return halves.view(torch.uint8).view(*halves.shape, 2)


# Packing -> writes blocks [rows, blocks, block_bytes] and says whether all scales are finite.
QUANTIZERS: Mapping[str, Callable[[Tensor, Tensor], bool]] = MappingProxyType({"Q4_1": _q4_1, "Q8_0": _q8_0})
