"""SafetensorsSource: the tensors of an HF folder, one file or many shards.

Owns which files make up a checkpoint. Pickle-based files (.bin, .pt, .pth) are never opened, since opening
them can run code.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from lightllm.errors import ModelLoadError
from lightllm.weights.base import PackedTensor

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NOT_QUANTISED = "quantised safetensors are not supported, use GGUF"

# Names of the language model in a multimodal checkpoint, as old and new versions of transformers write them;
# its other parts are not read.
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
_OTHER_PREFIXES = (
    *("vision_tower.", "multi_modal_projector."),
    *("model.vision_tower.", "model.multi_modal_projector."),
)


class SafetensorsSource:
    """A `WeightSource` over the safetensors files of a folder. Every thread reads headers by its own handles.

    Raises:
        ModelLoadError: no such files, a shard is missing or damaged, or shards and index disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles = threading.local()
        self._files = _from_index(folder) if (folder / INDEX_NAME).exists() else {}
        for file in sorted(set(self._files.values())) or _find_files(folder):
            for name in self._open(file).keys():  # noqa: SIM118 - a handle is not iterable
                if self._files.setdefault(name, file) != file:
                    raise ModelLoadError(f"{folder / file}: tensor {name} stands in {self._files[name]} too")
        for name, file in self._files.items():
            if name not in self._open(file).keys():  # noqa: SIM118
                raise ModelLoadError(
                    f"{folder / file}: tensor {name} is missing, though {INDEX_NAME} lists it"
                )
        self._stored = {
            _text_name(name): name for name in self._files if not name.startswith(_OTHER_PREFIXES)
        }
        if left_out := len(self._files) - len(self._stored):
            logger.info("%s: %d tensors that are not the language model's are left out", folder, left_out)

    def names(self) -> Iterable[str]:
        """HF names of all tensors."""
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header of its file."""
        file, stored = self._find(name)
        return tuple(self._open(file).get_slice(stored).get_shape())

    def file(self, name: str) -> str:
        """The path of the shard."""
        return str(self.folder / self._find(name)[0])

    def load(self, name: str) -> torch.Tensor | PackedTensor:
        """Read one tensor in its stored dtype, a floating-point one of 16 bits or more."""
        return self._read(name, lambda handle, stored: handle.get_tensor(stored))

    def block_size(self, name: str) -> int:
        """They are never quantised."""
        self._find(name)
        return 1

    def load_part(self, name: str, rows: range, columns: range | None) -> torch.Tensor | PackedTensor:
        """Read some rows and columns; the bytes of the others are not touched."""
        place = (_slice(rows), *(() if columns is None else (_slice(columns),)))
        return self._read(name, lambda handle, stored: handle.get_slice(stored)[place])

    def _read(self, name: str, get: Callable[[Any, str], torch.Tensor]) -> torch.Tensor:
        """Read through a mapping of the file that goes when the tensor does.

        A file that stayed mapped would count as memory of the process, page by page as it is read.
        """
        file, stored = self._find(name)
        try:
            tensor = get(_open_file(self.folder / file), stored)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelLoadError(f"{self.folder / file}: tensor {stored} cannot be read: {error}") from error
        if tensor.dtype not in DTYPES:
            raise ModelLoadError(
                f"{self.folder / file}: tensor {stored}: got {str(tensor.dtype).removeprefix('torch.')}, "
                f"expected float32, float16 or bfloat16; {_NOT_QUANTISED}"
            )
        return tensor

    def _find(self, name: str) -> tuple[str, str]:
        """The file of a tensor, and its name there."""
        stored = self._stored.get(name)
        if stored is not None:
            return self._files[stored], stored
        packed = name.removesuffix("weight") + "qweight"  # AWQ and GPTQ
        hint = (
            f", but {packed}: quantised safetensors are not supported, use GGUF"
            if packed in self._stored
            else ""
        )
        raise ModelLoadError(f"{self.folder}: no safetensors file has a tensor {name}{hint}")

    def _open(self, file: str) -> Any:
        handles = self._handles.__dict__
        if file not in handles:
            handles[file] = _open_file(self.folder / file)
        return handles[file]


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path}: no such file; the checkpoint is incomplete") from error
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path}: damaged or truncated safetensors file: {error}") from error


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)


def _text_name(name: str) -> str:
    for prefix, short in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name


def _from_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index of a sharded checkpoint says."""
    path = folder / INDEX_NAME
    try:
        index = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        files = msgspec.convert(index.get("weight_map"), type=dict[str, str])
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{path}: expected an object weight_map of tensor to file names: {error}"
        ) from error
    for name, file in files.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelLoadError(
                f"{path}: {name}: got file {file!r}, expected a .safetensors file in this folder"
            )
    return files


def _find_files(folder: Path) -> list[str]:
    """The files of a checkpoint without an index."""
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    if pickled:
        raise ModelLoadError(
            f"{folder}: has only pickle-based weights ({pickled[0]}), which are never opened because that "
            "can run code; convert them to safetensors"
        )
    raise ModelLoadError(
        f"{folder}: has no .safetensors file; to run with random weights pass --load_format dummy"
    )
