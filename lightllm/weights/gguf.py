"""GGUFReader: a memory-mapped reader of GGUF files, versions 2 and 3, little endian.

Owns the file format: metadata, tensor table, block sizes of the packings. Knows no tensor library, so that
the frontend can read a tokenizer out of a file without importing torch; `gguf_source` makes tensors of it.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import numpy as np

from lightllm.errors import ModelLoadError


class BlockLayout(NamedTuple):
    """How many elements a block of a packing holds, in how many bytes."""

    block_size: int
    block_bytes: int


BLOCK_LAYOUTS: Mapping[str, BlockLayout] = MappingProxyType(
    {
        "F32": BlockLayout(1, 4),
        "F16": BlockLayout(1, 2),
        "BF16": BlockLayout(1, 2),
        "F64": BlockLayout(1, 8),
        "I8": BlockLayout(1, 1),
        "I16": BlockLayout(1, 2),
        "I32": BlockLayout(1, 4),
        "I64": BlockLayout(1, 8),
        "Q4_0": BlockLayout(32, 18),
        "Q4_1": BlockLayout(32, 20),
        "Q5_0": BlockLayout(32, 22),
        "Q5_1": BlockLayout(32, 24),
        "Q8_0": BlockLayout(32, 34),
        "Q2_K": BlockLayout(256, 84),
        "Q3_K": BlockLayout(256, 110),
        "Q4_K": BlockLayout(256, 144),
        "Q5_K": BlockLayout(256, 176),
        "Q6_K": BlockLayout(256, 210),
        "IQ4_NL": BlockLayout(32, 18),
        "IQ4_XS": BlockLayout(256, 136),
    }
)

# Number of a type in the file -> its name. Only names with a layout above can be read.
# fmt: off
_TYPE_NAMES: Mapping[int, str] = MappingProxyType({
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
})
# Number of a metadata value type -> numpy dtype; strings and arrays are no scalars.
_SCALARS: Mapping[int, str] = MappingProxyType({
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
})
# fmt: on
_STRING = 8
_ARRAY = 9
_MAX_DIMS = 4
# Elements of a metadata array: far more than any vocabulary, far less than a damaged count may claim.
_MAX_ARRAY = 1 << 24
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` in row-major order ([out, in]), `offset` from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GGUFReader:
    """An open GGUF file. Immutable after construction, so any thread may read from it.

    Attributes:
        path: the file.
        metadata: key -> int, float, bool, str or list of these.
        tensors: name in the file -> TensorInfo, in the file's order.

    Raises:
        ModelLoadError: the file is missing, is no GGUF file, or is truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # A private mapping is writable in the eyes of torch, which warns about read-only buffers, and
                # still never changes the file.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path}: cannot be opened: {error}") from error
        self.size = len(self._map)
        self._position = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._read()
        except struct.error as error:
            self._fail(f"truncated in its header, near byte {self._position} of {self.size}", error)
        except UnicodeDecodeError as error:
            self._fail(f"damaged: text before byte {self._position} is not UTF-8", error)

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, without copying. The view keeps the mapping alive."""
        info = self.tensors[name]
        return memoryview(self._map)[info.offset : info.offset + info.num_bytes]

    def _fail(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise ModelLoadError(f"{self.path}: {what}") from cause

    def _u32(self) -> int:
        (value,) = _U32.unpack_from(self._map, self._position)
        self._position += 4
        return int(value)

    def _u64(self) -> int:
        (value,) = _U64.unpack_from(self._map, self._position)
        self._position += 8
        return int(value)

    def _read(self) -> None:
        if self._map[:4] != b"GGUF":
            self._fail(f"not a GGUF file: starts with {self._map[:4]!r}, expected b'GGUF'")
        self._position = 4
        version = self._u32()
        if version not in (2, 3):
            hint = " (written on a big-endian machine?)" if version & 0xFFFF == 0 else ""
            self._fail(f"GGUF version: got {version}{hint}, expected 2 or 3")
        num_tensors, num_keys = self._u64(), self._u64()
        for count, what in ((num_tensors, "tensors"), (num_keys, "metadata keys")):
            if count > self.size // 12:
                self._fail(f"damaged: claims {count} {what}, more than {self.size} bytes can hold")
        for _ in range(num_keys):
            key = self._name("a metadata key")
            if key in self.metadata:
                self._fail(f"damaged: metadata key {key!r} stands twice")
            self.metadata[key] = self._value(key, self._u32())
        if self.metadata.get("split.count", 1) != 1:
            self._fail("one part of a split file; join the parts with `llama-gguf-split --merge` first")
        self._read_tensors(num_tensors)

    def _name(self, what: str) -> str:
        name = self._strings(1, what)[0]
        if not name.isprintable():  # names stand in messages of one line
            self._fail(f"damaged: {what} is {name!r:.80}")
        return name

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._strings(1, key)[0]
        if kind != _ARRAY:
            return self._numbers(1, kind, key)[0]
        kind, count = self._u32(), self._u64()
        if count > _MAX_ARRAY:
            self._fail(f"damaged: {key} claims {count} values; at most {_MAX_ARRAY} are read")
        if kind == _STRING:
            return self._strings(count, key)
        return self._numbers(count, kind, key)

    def _strings(self, count: int, key: str) -> list[str]:
        if count > (self.size - self._position) // 8:
            self._fail(f"truncated: {key} claims {count} strings, beyond the end of the file")
        unpack, data, position = _U64.unpack_from, self._map, self._position
        strings = []
        # The hot loop of opening a file: vocabulary and merges are some 100,000 strings.
        for _ in range(count):
            (length,) = unpack(data, position)
            start = position + 8
            position = start + length
            if position > self.size:
                self._fail(f"truncated: a string of {key} claims {length} bytes, beyond the end of the file")
            strings.append(data[start:position].decode())
        self._position = position
        return strings

    def _numbers(self, count: int, kind: int, key: str) -> list[Any]:
        if kind not in _SCALARS:
            self._fail(f"{key}: value type {kind}, expected a known scalar, string or array of these")
        dtype = np.dtype(_SCALARS[kind])
        if count > (self.size - self._position) // dtype.itemsize:
            self._fail(f"truncated: {key} claims {count} values, beyond the end of the file")
        values = np.frombuffer(self._map, dtype, count, self._position).tolist()
        self._position += count * dtype.itemsize
        return list(values)

    def _read_tensors(self, num_tensors: int) -> None:
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            self._fail(f"general.alignment: got {alignment!r}, expected a power of two >= 8")
        data_start = -(-self._position // alignment) * alignment
        for info in infos:
            offset = data_start + info.offset
            if info.name in self.tensors:
                self._fail(f"damaged: tensor {info.name} stands twice")
            if info.offset % alignment:
                self._fail(
                    f"damaged: tensor {info.name} at {info.offset}, expected a multiple of {alignment}"
                )
            if offset + info.num_bytes > self.size:
                self._fail(
                    f"truncated: tensor {info.name} needs bytes {offset} to {offset + info.num_bytes}, "
                    f"the file has {self.size}; download it again"
                )
            self.tensors[info.name] = TensorInfo(info.name, info.type, info.shape, offset, info.num_bytes)

    def _tensor_info(self) -> TensorInfo:
        """One row of the tensor table; its offset is still relative to the start of the data."""
        name = self._name("a tensor name")
        num_dims = self._u32()
        if not 1 <= num_dims <= _MAX_DIMS:
            self._fail(f"tensor {name}: got {num_dims} dimensions, expected 1 to {_MAX_DIMS}")
        shape = tuple(self._u64() for _ in range(num_dims))[::-1]
        number, offset = self._u32(), self._u64()
        kind = _TYPE_NAMES.get(number, f"number {number}")
        layout = BLOCK_LAYOUTS.get(kind)
        if layout is None:
            self._fail(f"tensor {name}: got type {kind}, expected one of {', '.join(BLOCK_LAYOUTS)}")
        if shape[-1] % layout.block_size:
            self._fail(f"tensor {name}: rows of {shape[-1]}, expected a multiple of {layout.block_size}")
        num_elements = 1
        for dim in shape:
            num_elements *= dim
        if not num_elements:
            self._fail(f"tensor {name}: got shape {shape}, expected no zero in it")
        return TensorInfo(name, kind, shape, offset, num_elements // layout.block_size * layout.block_bytes)
