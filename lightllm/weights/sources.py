"""Choose the weight source for a located model by its files."""

from pathlib import Path

from lightllm.errors import ModelLoadError
from lightllm.weights.base import WeightSource
from lightllm.weights.gguf import GGUFReader
from lightllm.weights.gguf_source import GGUFSource
from lightllm.weights.safetensors import SafetensorsSource


def open_weights(path: Path, load_format: str = "auto") -> WeightSource:
    """Open the weights of a model.

    Args:
        path: a .gguf file or an HF folder (`ModelFiles.path`).
        load_format: auto, safetensors or gguf.

    Raises:
        ModelLoadError: the files are missing or damaged, or not of the format asked for.
    """
    found = "gguf" if path.is_file() else "safetensors"
    if load_format not in ("auto", found):
        raise ModelLoadError(f"--load_format: got {load_format}, but {path} holds {found} weights")
    return GGUFSource(GGUFReader(path)) if found == "gguf" else SafetensorsSource(path)
