"""Choose the weight source for a located model: the one place that knows all of them."""

from pathlib import Path

from lightllm.errors import ModelLoadError
from lightllm.model_config import ModelConfig
from lightllm.weights.base import WeightSource
from lightllm.weights.dummy import DummySource
from lightllm.weights.gguf import GGUFReader
from lightllm.weights.gguf_source import GGUFSource
from lightllm.weights.safetensors import SafetensorsSource


def open_weights(
    path: Path, config: ModelConfig, load_format: str = "auto", *, seed: int = 0
) -> WeightSource:
    """Open the weights of a model.

    Args:
        path: a .gguf file or an HF folder (`ModelFiles.path`).
        config: dimensions for dummy weights; real ones are checked against it by whoever loads them.
        load_format: auto, safetensors, gguf or dummy.

    Raises:
        ModelLoadError: the files are missing or damaged, or not of the format asked for.
    """
    if load_format == "dummy":
        return DummySource(config, seed)
    found = "gguf" if path.is_file() else "safetensors"
    if load_format not in ("auto", found):
        raise ModelLoadError(f"--load_format: got {load_format}, but {path} holds {found} weights")
    return GGUFSource(GGUFReader(path)) if found == "gguf" else SafetensorsSource(path)
