"""Small GGUF files made with the `gguf` package, which the code under test does not use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# Bytes of a block that hold float16 scales; random bits there would give infinities.
SCALE_OFFSETS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def random_blocks(kind: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random packed rows [rows, blocks * block_bytes], uint8: every number possible, scales finite."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (rows * blocks, block_bytes), dtype=np.uint8)
    for offset in SCALE_OFFSETS[kind]:
        scales = rng.normal(size=rows * blocks).astype(np.float16)
        packed[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return packed.reshape(rows, -1)


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, str]],
    metadata: Mapping[str, Any] | None = None,
    arch: str = "llama",
) -> Path:
    """Write plain arrays, and (packed rows, type name) pairs, with some metadata."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (metadata or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=gguf.GGMLQuantizationType[tensor[1]])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
