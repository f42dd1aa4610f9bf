"""Turn `tokenizer.ggml.*` metadata into a tokenizer of the `tokenizers` library.

Two kinds exist here: `gpt2`, byte-level BPE with a named way of splitting text first, and `llama`,
SentencePiece BPE whose merges follow from the scores. Unknown kinds and splits are refused: a wrong guess
would silently change every prompt. Knows metadata only, no file format.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import tokenizers

from lightllm.errors import ModelLoadError

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = "\u2581"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class _Split(NamedTuple):
    """How text is cut before BPE.

    `pattern` is a regular expression whose matches are the pieces; None is GPT-2's own. With
    `is_ignoring_merges` a piece that is itself a token is taken as it is.
    """

    pattern: str | None = None
    splits_digits: bool = False
    normalizer: str | None = None
    is_ignoring_merges: bool = False
    adds_bos: bool = False


_LLAMA3 = _Split(
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST, is_ignoring_merges=True, adds_bos=True
)
_QWEN2 = _Split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST, normalizer="NFC")

# tokenizer.ggml.pre -> how to split.
_SPLITS: Mapping[str, _Split] = MappingProxyType(
    {
        "gpt-2": _Split(),
        "smollm": _Split(splits_digits=True),
        "starcoder": _Split(splits_digits=True),
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "qwen2": _QWEN2,
        "deepseek-r1-qwen": _QWEN2,
    }
)


def build(metadata: Mapping[str, Any], origin: str) -> tokenizers.Tokenizer:
    """The tokenizer that some GGUF metadata describes.

    Args:
        origin: file name, for messages.

    Raises:
        ModelLoadError: kind or split are not known, or keys are missing or contradict each other.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if not tokens or not isinstance(tokens, list):
        raise ModelLoadError(f"{origin}: has no tokenizer (tokenizer.ggml.tokens); pass --tokenizer_dir")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ModelLoadError(
            f"{origin}: tokenizer.ggml.token_type: expected one entry per token ({len(tokens)})"
        )
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) != len(tokens):
        raise ModelLoadError(
            f"{origin}: tokenizer.ggml.tokens: got {len(tokens) - len(vocab)} repeated tokens"
        )
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        parts = _byte_level(metadata, vocab, origin)
    elif kind == "llama":
        parts = _sentencepiece(metadata, vocab, types, origin)
    else:
        raise ModelLoadError(f"{origin}: tokenizer.ggml.model: got {kind!r}, expected gpt2 or llama")
    parts["added_tokens"] = _added_tokens(tokens, types)
    # The library reads its own JSON as fast as Python objects.
    document = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, **parts}
    try:
        return tokenizers.Tokenizer.from_buffer(msgspec.json.encode(document))
    except Exception as error:
        raise ModelLoadError(f"{origin}: tokenizer.ggml.*: no consistent tokenizer: {error}") from error


def byte_characters() -> str:
    """The character by which byte-level BPE writes each of the 256 bytes, in order.

    Printable Latin-1 characters stand for themselves, all others for the characters from U+0100 on (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte if byte in printable else 256 + hidden.index(byte)) for byte in range(256))


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int], origin: str) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre")
    split = _SPLITS.get(str(name))
    if split is None:
        known = ", ".join(sorted(_SPLITS))
        raise ModelLoadError(
            f"{origin}: tokenizer.ggml.pre: got {name!r}, expected one of {known}; pass --tokenizer_dir "
            "with the model's original tokenizer.json"
        )
    steps: list[dict[str, Any]] = []
    if split.splits_digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if split.pattern is not None:
        pattern = {"Regex": split.pattern}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    level = {"type": "ByteLevel", "add_prefix_space": has_prefix, "trim_offsets": True}
    steps.append({**level, "use_regex": split.pattern is None})
    merges = metadata.get("tokenizer.ggml.merges") or []
    return {
        "normalizer": {"type": split.normalizer} if split.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _template(metadata, list(vocab), split.adds_bos, origin),
        "decoder": {**level, "use_regex": True},
        "model": {**_bpe(vocab, merges), "ignore_merges": split.is_ignoring_merges},
    }


def _sentencepiece(
    metadata: Mapping[str, Any], vocab: dict[str, int], types: Sequence[int], origin: str
) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocab):
        raise ModelLoadError(f"{origin}: tokenizer.ggml.scores: expected one entry per token ({len(vocab)})")
    has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    unknown = next((token for token, kind in zip(vocab, types, strict=True) if kind == _UNKNOWN), None)
    merges = _merges_from_scores(vocab, scores, types)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*([prepend] if has_prefix else []), replace]},
        "pre_tokenizer": None,
        "post_processor": _template(metadata, list(vocab), True, origin),
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if has_prefix else [])],
        },
        "model": {
            **_bpe(vocab, merges),
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": _BYTE in types,
        },
    }


def _merges_from_scores(
    vocab: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """All ways to join two tokens into a third, best score first; ties by the ids of the parts."""
    found = []
    for token, token_id in vocab.items():
        if types[token_id] in (_UNKNOWN, _CONTROL, _UNUSED, _BYTE):
            continue
        for i in range(1, len(token)):
            left, right = vocab.get(token[:i]), vocab.get(token[i:])
            if left is not None and right is not None:
                found.append((-scores[token_id], token_id, left, right, token[:i], token[i:]))
    return [(left, right) for *_, left, right in sorted(found)]


def _bpe(vocab: Mapping[str, int], merges: Sequence[str] | Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that are found in the text before anything else is done to it; control tokens are special."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": tokens[i], **plain, "special": kind != _USER_DEFINED}
        for i, kind in enumerate(types)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _template(
    metadata: Mapping[str, Any], tokens: Sequence[str], adds_bos: bool, origin: str
) -> dict[str, Any]:
    """What `add_special_tokens` puts around a text."""
    names = []
    for name, default in (("bos", adds_bos), ("eos", False)):
        is_added = bool(metadata.get(f"tokenizer.ggml.add_{name}_token", default))
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if is_added and (not isinstance(token_id, int) or not 0 <= token_id < len(tokens)):
            raise ModelLoadError(
                f"{origin}: tokenizer.ggml.{name}_token_id: got {token_id!r}, expected a token id"
            )
        names.append((tokens[token_id], token_id) if is_added and token_id is not None else None)
    bos, eos = names
    first = [{"SpecialToken": {"id": bos[0], "type_id": 0}}] if bos else []
    last = [{"SpecialToken": {"id": eos[0], "type_id": 0}}] if eos else []
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last]
    pair = [*single, *first, {"Sequence": {"id": "B", "type_id": 0}}, *last]
    special = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (n for n in names if n)}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
