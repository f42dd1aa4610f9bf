"""One short text for a model, one for a tokenizer: equal on two machines if their files hold the same.

Over the dimensions, the index of weights (names, types, shapes, places) and NUM_SAMPLES pieces of the weights
themselves, spread evenly: all bytes would take longer than loading. Another training of the same model is
told apart, since it changes nearly all weights; a change of a hundredth of the bytes is found in nine of ten
cases. It costs some milliseconds; where the files lie does not matter. Imports no torch.
"""

import hashlib
import itertools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightllm import messages
from lightllm.errors import ModelLoadError
from lightllm.server.model_files import ModelDescription, ModelFiles
from lightllm.weights.gguf import GGUFReader

MAX_HEADER_BYTES = 100_000_000
NUM_SAMPLES = 256
SAMPLE_BYTES = 256


def model_fingerprint(description: ModelDescription) -> str:
    """Digest of a described model, 16 hexadecimal digits.

    Raises:
        ModelLoadError: a weight file cannot be read.
    """
    digest = hashlib.sha256(messages.encode(description.config))
    path = description.files.path
    if description.load_format == "dummy":
        digest.update(b"dummy")
        files = []
    elif description.files.kind == "gguf":
        for tensor in GGUFReader(path).tensors.values():
            digest.update(repr((tensor.name, tensor.type, tensor.shape, tensor.offset)).encode())
        files = [path]
    else:
        files = sorted(path.glob("*.safetensors"))
        for file in files:
            digest.update(file.name.encode() + _header(file))
    try:
        for piece in _samples(files):
            digest.update(piece)
    except OSError as error:
        raise ModelLoadError(f"{path}: its weights cannot be read: {error}") from error
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


def _samples(files: Sequence[Path]) -> Iterator[bytes]:
    """Their whole size, then NUM_SAMPLES pieces of them, read as if they lay one behind the other."""
    ends = list(itertools.accumulate(file.stat().st_size for file in files))
    yield repr(ends).encode()
    for index, (file, end) in enumerate(zip(files, ends, strict=True)):
        start = ends[index - 1] if index else 0
        places = (ends[-1] * (2 * i + 1) // (2 * NUM_SAMPLES) for i in range(NUM_SAMPLES))
        with file.open("rb", buffering=0) as opened:
            for place in (place for place in places if start <= place < end):
                opened.seek(place - start)
                yield opened.read(SAMPLE_BYTES)


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
