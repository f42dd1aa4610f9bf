"""SafetensorsSource: the tensors of an HF folder, one file or many shards.

Owns which files make up a checkpoint. Pickle-based files (.bin, .pt, .pth) are never opened, since opening
them can run code.
"""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from lightllm.errors import ModelLoadError
from lightllm.weights.base import PackedTensor

INDEX_NAME = "model.safetensors.index.json"


class SafetensorsSource:
    """A `WeightSource` over the safetensors files of a folder. Every thread opens its own handles.

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

    def names(self) -> Iterable[str]:
        """HF names of all tensors."""
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header of its file."""
        return tuple(self._open(self._find(name)).get_slice(name).get_shape())

    def file(self, name: str) -> str:
        """The path of the shard."""
        return str(self.folder / self._find(name))

    def load(self, name: str) -> torch.Tensor | PackedTensor:
        """Read one tensor in its stored dtype."""
        file = self._find(name)
        try:
            tensor: torch.Tensor = self._open(file).get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelLoadError(f"{self.folder / file}: tensor {name} cannot be read: {error}") from error
        return tensor

    def _find(self, name: str) -> str:
        if name not in self._files:
            raise ModelLoadError(f"{self.folder}: no safetensors file has a tensor {name}")
        return self._files[name]

    def _open(self, file: str) -> Any:
        handles = self._handles.__dict__
        if file not in handles:
            path = self.folder / file
            try:
                handles[file] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise ModelLoadError(f"{path}: no such file; the checkpoint is incomplete") from error
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(f"{path}: damaged or truncated safetensors file: {error}") from error
        return handles[file]


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
