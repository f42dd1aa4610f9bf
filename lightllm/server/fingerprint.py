"""One short text for a model, one for a tokenizer: equal on two machines if their files hold the same.

Over the dimensions and the index of weights (names, types, shapes, places), not over the bytes of weights, so
that it costs nothing; where the files lie does not matter. Imports no torch.
"""

import hashlib
import struct
from pathlib import Path

from lightllm import messages
from lightllm.errors import ModelLoadError
from lightllm.server.model_files import ModelDescription, ModelFiles
from lightllm.weights.gguf import GGUFReader

MAX_HEADER_BYTES = 100_000_000


def model_fingerprint(description: ModelDescription) -> str:
    """Digest of a described model, 16 hexadecimal digits.

    Raises:
        ModelLoadError: a weight file cannot be read.
    """
    digest = hashlib.sha256(messages.encode(description.config))
    path = description.files.path
    if description.load_format == "dummy":
        digest.update(b"dummy")
    elif description.files.kind == "gguf":
        for tensor in GGUFReader(path).tensors.values():
            digest.update(repr((tensor.name, tensor.type, tensor.shape, tensor.offset)).encode())
    else:
        for file in sorted(path.glob("*.safetensors")):
            digest.update(file.name.encode() + _header(file))
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(files: ModelFiles) -> str:
    """Digest of a located tokenizer, 16 hexadecimal digits.

    Raises:
        ModelLoadError: a file of it cannot be read.
    """
    digest = hashlib.sha256()
    if files.kind == "gguf":
        for key, value in sorted(GGUFReader(files.path).metadata.items()):
            if key.startswith("tokenizer.ggml."):
                digest.update(repr((key, value)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"):
        path = files.path / name
        try:
            digest.update(path.read_bytes() if path.exists() else b"none")
        except OSError as error:
            raise ModelLoadError(f"{path}: cannot be read: {error}") from error
    return digest.hexdigest()[:16]


def _header(path: Path) -> bytes:
    """The header of a safetensors file: its length in 8 bytes, then JSON with every tensor's place."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ModelLoadError(f"{path}: damaged: claims a header of {length} bytes")
            return file.read(length)
    except (OSError, struct.error) as error:
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error
