"""What every weight source offers, and the packed form in which quantised tensors travel.

A source knows names, shapes and bytes; it does not know models, devices or fusion (models/ decide those).
Runs in the process that holds the model (worker, or engine with tp 1); imports torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from lightllm.errors import ModelLoadError
from lightllm.weights import dequant
from lightllm.weights.gguf import BLOCK_LAYOUTS


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A two-dimensional quantised tensor exactly as its file stores it.

    Blocks never cross a row, so rows may be sliced or permuted without unpacking.

    Attributes:
        type: GGUF name of the packing, a key of `dequant.UNPACKERS` ("Q4_1", "Q8_0", ...).
        data: [rows, bytes_per_row] uint8, CPU; often a read-only view of a memory map: never write into it.
        shape: (rows, columns) of the tensor it stands for.
    """

    type: str
    data: torch.Tensor
    shape: tuple[int, int]

    def dequantize(self, rows: slice | None = None) -> torch.Tensor:
        """Unpack all rows, or those of a slice, into a new float32 tensor [rows, columns] on the CPU."""
        data = self.data if rows is None else self.data[rows]
        return dequant.dequantize(self.type, data, self.shape[1])

    def part(self, rows: range, columns: range) -> "PackedTensor":
        """Some rows and columns of it, which must lie on the borders of blocks.

        Raises:
            ModelLoadError: they do not.
        """
        block = BLOCK_LAYOUTS[self.type]
        if columns.start % block.block_size or columns.stop % block.block_size:
            raise ModelLoadError(
                f"columns {columns.start} to {columns.stop} of a {self.type} tensor: its blocks of "
                f"{block.block_size} cannot be cut"
            )
        first, last = (edge // block.block_size * block.block_bytes for edge in (columns.start, columns.stop))
        data = self.data[rows.start : rows.stop, first:last].contiguous()
        return PackedTensor(self.type, data, (len(rows), len(columns)))


class WeightSource(Protocol):
    """Tensors by HF name. All methods may be called from several threads at once."""

    def names(self) -> Iterable[str]:
        """HF names of all tensors, in the file's order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in HF order ([out, in] for linears), without reading it.

        Raises:
            ModelLoadError: there is no such tensor; the message names file and tensor.
        """
        ...

    def file(self, name: str) -> str:
        """The file that holds a tensor, and its name there if that differs: for messages.

        Raises:
            ModelLoadError: there is no such tensor.
        """
        ...

    def block_size(self, name: str) -> int:
        """Columns of a tensor that are stored together and cannot be cut; 1 if it is not quantised.

        Raises:
            ModelLoadError: there is no such tensor.
        """
        ...

    def load_part(self, name: str, rows: range, columns: range | None) -> torch.Tensor | PackedTensor:
        """As `load`, but only some rows and columns, and no more of the file than they need.

        Args:
            columns: on the borders of blocks; None where the tensor has one dimension.
        """
        ...

    def load(self, name: str) -> torch.Tensor | PackedTensor:
        """Read one tensor in its stored dtype; quantised ones come packed.

        The result may share memory with the file and must not be written to.

        Raises:
            ModelLoadError: there is no such tensor, or its bytes are damaged.
        """
        ...
