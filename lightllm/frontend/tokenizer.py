"""Tokenizer: text to ids and back with the `tokenizers` library, and the model's chat template.

Built from an HF folder or from GGUF metadata (`gguf_vocab` translates these). Runs in the frontend process,
and in clients that count tokens; never imports torch, and transformers only when asked, for folders without
tokenizer.json.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from lightllm.config_keys import Keys
from lightllm.errors import ModelLoadError, RequestError
from lightllm.frontend import gguf_vocab
from lightllm.frontend.chat_template import ChatTemplate, read_chat_template

# Longer texts should be encoded in a thread; below, the hop to one costs more.
INLINE_CHARS = 2048
# The same for ids and their text.
INLINE_IDS = 1024

_SPACE = "\u2581"  # how SentencePiece writes a space


class Tokenizer:
    """A model's tokenizer. Immutable and thread-safe; texts over INLINE_CHARS are encoded, and more than
    INLINE_IDS decoded, without Python's lock, so that other threads go on meanwhile.

    Args:
        backend: the tokenizer of the `tokenizers` library.
        bos_token_id: begin of text, if the model has one.
        eos_token_ids: ids that the tokenizer's own files call end of text.
        chat_template: Jinja source, None if the model has none.
        origin: path, for messages.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        origin: str = "tokenizer",
    ) -> None:
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids = list(eos_token_ids)
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._origin = origin
        self._is_byte_level = "ByteLevel" in repr(backend.decoder)
        self._template = ChatTemplate(chat_template, origin, self._constants()) if chat_template else None

    @classmethod
    def from_folder(
        cls, folder: Path, *, mode: str = "fast", chat_template: str | None = None
    ) -> "Tokenizer":
        """Read tokenizer.json and tokenizer_config.json of an HF folder.

        Args:
            mode: fast needs tokenizer.json; auto converts other kinds with transformers; slow always asks
                transformers and refuses models without a reference implementation.
            chat_template: replaces the folder's own.

        Raises:
            ModelLoadError: files are missing or damaged.
        """
        settings = _read_json(folder / "tokenizer_config.json")
        special = _read_json(folder / "special_tokens_map.json")
        backend = _load_backend(folder, mode)
        ids = {}
        for name in ("bos_token", "eos_token"):
            entry = settings.get(name) or special.get(name)
            text = entry.get("content") if isinstance(entry, dict) else entry
            ids[name] = backend.token_to_id(text) if isinstance(text, str) else None
        eos = ids["eos_token"]
        return cls(
            backend,
            bos_token_id=ids["bos_token"],
            eos_token_ids=[] if eos is None else [eos],
            chat_template=chat_template or read_chat_template(folder, settings),
            origin=str(folder),
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, chat_template: str | None = None, origin: str = "GGUF metadata"
    ) -> "Tokenizer":
        """Rebuild the tokenizer that a GGUF file describes.

        Raises:
            ModelLoadError: a kind of tokenizer that is not known, or damaged metadata.
        """
        keys = Keys(metadata, origin)
        return cls(
            gguf_vocab.build(metadata, origin),
            bos_token_id=keys.optional_int("tokenizer.ggml.bos_token_id"),
            eos_token_ids=keys.ids("tokenizer.ggml.eos_token_id"),
            chat_template=chat_template or keys.text("tokenizer.chat_template", ""),
            origin=origin,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; special tokens written out in it become their ids.

        Args:
            add_special_tokens: also add those that the model wants around a text (begin of text, mostly).

        Raises:
            RequestError: the text holds lone surrogates.
        """
        try:
            if len(text) <= INLINE_CHARS:
                encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
            else:  # only the calls for several texts give Python's lock away
                (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError("the text is not valid Unicode: it holds a lone surrogate") from error
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of some ids; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        if len(ids) <= INLINE_IDS:
            text: str = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        else:  # only the calls for several texts give Python's lock away
            (text,) = self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be turned into a prompt."""
        return self._template is not None

    def template_uses(self, variable: str) -> bool:
        """Whether the chat template looks at a variable, as `tools` or `reasoning_effort`."""
        return self._template is not None and self._template.uses(variable)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The prompt text of a conversation, special tokens included; see `ChatTemplate.render`.

        Raises:
            RequestError: there is no template, or it refuses these messages.
        """
        if self._template is None:
            raise RequestError(
                f"{self._origin}: the model has no chat template; use completions or pass --chat_template",
                code="not_supported",
            )
        return self._template.render(messages, **kwargs)

    def token_str(self, token_id: int) -> str:
        """One token as text, special tokens by name; bytes that are no UTF-8 by themselves become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for an id outside the vocabulary."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return b"".join(self._byte_table.get(char, char.encode()) for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return str(token).replace(_SPACE, " ").encode()

    @cached_property
    def _byte_table(self) -> dict[str, bytes]:
        return {char: bytes([byte]) for byte, char in enumerate(gguf_vocab.byte_characters())}

    def _constants(self) -> dict[str, str]:
        """Names that templates use for the tokens around a text."""
        eos = self.eos_token_ids[0] if self.eos_token_ids else None
        ids = {"bos_token": self.bos_token_id, "eos_token": eos}
        return {name: "" if i is None else self.backend.id_to_token(i) or "" for name, i in ids.items()}


def _read_json(path: Path) -> dict[str, Any]:
    """An object from a file; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: not a readable JSON object: {error}") from error


def _load_backend(folder: Path, mode: str) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if mode == "slow" or (mode == "auto" and not path.exists()):
        return _convert_with_transformers(folder)
    if not path.exists():
        raise ModelLoadError(
            f"{folder}: has no tokenizer.json; pass --tokenizer_dir, or --tokenizer_mode auto to convert its "
            "tokenizer with the package transformers"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise ModelLoadError(f"{path}: not a readable tokenizer: {error}") from error


def _convert_with_transformers(folder: Path) -> tokenizers.Tokenizer:
    """Tokenizer of a folder in another format; never runs code of the model."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelLoadError(f"{folder}: this tokenizer needs the package transformers") from error
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ModelLoadError(f"{folder}: transformers cannot load this tokenizer: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ModelLoadError(f"{folder}: tokenizer {type(loaded).__name__} has no form that can be used here")
    return backend
