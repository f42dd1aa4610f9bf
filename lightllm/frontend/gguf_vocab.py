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

from lightllm.config_keys import Keys
from lightllm.errors import ModelLoadError

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = "\u2581"
_REMEDY = "pass --tokenizer_dir with the model's original tokenizer.json"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _cased(suffix: str, digits: str) -> str:
    """Words that end where a small letter is followed by a capital (GPT-4o, Mistral's Tekken)."""
    start, upper, lower = (
        r"[^\r\n\p{L}\p{N}]?",
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    )
    words = f"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}|{digits}"
    return words + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class _Split(NamedTuple):
    """How text is cut before BPE.

    Each of `patterns` in turn cuts the pieces so far into its matches and what lies between them; none means
    GPT-2's own. With `is_ignoring_merges` a piece that is itself a token is taken as it is.
    """

    patterns: tuple[str, ...] = ()
    splits_digits: bool = False
    normalizer: str | None = None
    is_ignoring_merges: bool = False
    adds_bos: bool = False


_THREE_DIGITS = (_WORDS + r"\p{N}{1,3}|" + _REST,)
_LLAMA3 = _Split(_THREE_DIGITS, is_ignoring_merges=True, adds_bos=True)
_QWEN2 = _Split((_WORDS + r"\p{N}|" + _REST,), normalizer="NFC")

# tokenizer.ggml.pre -> how to split, as llama.cpp does or, where that is known, the original tokenizer.
_SPLITS: Mapping[str, _Split] = MappingProxyType(
    {
        "default": _Split((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "gpt-2": _Split(),
        "phi-2": _Split(),
        "smollm": _Split(splits_digits=True),
        "starcoder": _Split(splits_digits=True),
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "falcon3": _LLAMA3,
        "dbrx": _Split(_THREE_DIGITS),
        "smaug-bpe": _Split(_THREE_DIGITS),
        "glm4": _Split(_THREE_DIGITS),
        "chatglm-bpe": _Split(_THREE_DIGITS),
        "qwen2": _QWEN2,
        "deepseek-r1-qwen": _QWEN2,
        "megrez": _QWEN2,
        "tekken": _Split((_cased("", r"\p{N}"),), is_ignoring_merges=True, adds_bos=True),
        "gpt-4o": _Split((_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),)),
        "deepseek-coder": _Split(
            (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
        ),
    }
)


def build(metadata: Mapping[str, Any], origin: str) -> tokenizers.Tokenizer:
    """The tokenizer that some GGUF metadata describes.

    Args:
        origin: file name, for messages.

    Raises:
        ModelLoadError: kind or split are not known, or keys are missing or contradict each other.
    """
    keys = Keys(metadata, origin, "tokenizer.ggml.")
    tokens = _array(keys, "tokens", str)
    if not tokens:
        raise ModelLoadError(f"{origin}: has no tokenizer (tokenizer.ggml.tokens); pass --tokenizer_dir")
    if "" in tokens:  # some converters leave holes; nothing is written by an empty token
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    types = _array(keys, "token_type", int, len(tokens))
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) != len(tokens):
        raise ModelLoadError(
            f"{origin}: tokenizer.ggml.tokens: got {len(tokens) - len(vocab)} repeated tokens"
        )
    kind = keys.text("model")
    if kind == "gpt2":
        parts = _byte_level(keys, vocab)
    elif kind == "llama":
        parts = _sentencepiece(keys, vocab, types)
    else:
        keys.refuse("model", f"gpt2 or llama; {_REMEDY}")
    is_phi3 = kind == "llama" and metadata.get("general.architecture") == "phi3"
    parts["added_tokens"] = _added_tokens(tokens, types, is_phi3)
    # The library reads its own JSON as fast as Python objects.
    document = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, **parts}
    try:
        return tokenizers.Tokenizer.from_buffer(msgspec.json.encode(document))
    except Exception as error:
        raise ModelLoadError(
            f"{origin}: tokenizer.ggml.*: no consistent tokenizer: {' '.join(str(error).split())}"
        ) from error


def _array(keys: Keys, name: str, kind: type | tuple[type, ...], length: int | None = None) -> list[Any]:
    """An array of GGUF, whose values are all of one type; empty if absent and of any length."""
    values = keys.sequence(name)
    if length is not None and len(values) != length:
        raise ModelLoadError(
            f"{keys.origin}: {keys.prefix}{name}: got {len(values)} entries, expected {length}, one per token"
        )
    if values and not isinstance(values[0], kind):
        keys.refuse(name, "another type of values")
    return values


def byte_characters() -> str:
    """The character by which byte-level BPE writes each of the 256 bytes, in order.

    Printable Latin-1 characters stand for themselves, all others for the characters from U+0100 on (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte if byte in printable else 256 + hidden.index(byte)) for byte in range(256))


def _byte_level(keys: Keys, vocab: dict[str, int]) -> dict[str, Any]:
    split = _SPLITS.get(keys.text("pre", "unnamed"))
    if split is None:
        keys.refuse("pre", f"one of {', '.join(sorted(_SPLITS))}; {_REMEDY}")
    steps: list[dict[str, Any]] = []
    if split.splits_digits:
        steps.append({"type": "Digits", "individual_digits": True})
    for pattern in split.patterns:
        steps.append(
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        )
    has_prefix = keys.boolean("add_space_prefix", False)
    level = {"type": "ByteLevel", "add_prefix_space": has_prefix, "trim_offsets": True}
    steps.append({**level, "use_regex": not split.patterns})
    return {
        "normalizer": {"type": split.normalizer} if split.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _template(keys, list(vocab), split.adds_bos),
        "decoder": {**level, "use_regex": True},
        "model": {**_bpe(vocab, _array(keys, "merges", str)), "ignore_merges": split.is_ignoring_merges},
    }


def _sentencepiece(keys: Keys, vocab: dict[str, int], types: Sequence[int]) -> dict[str, Any]:
    scores = _array(keys, "scores", (int, float), len(vocab))
    has_prefix = keys.boolean("add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    unknown = next((token for token, kind in zip(vocab, types, strict=True) if kind == _UNKNOWN), None)
    merges = _merges_from_scores(vocab, scores, types)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*([prepend] if has_prefix else []), replace]},
        "pre_tokenizer": None,
        "post_processor": _template(keys, list(vocab), True),
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


def _added_tokens(tokens: Sequence[str], types: Sequence[int], is_phi3: bool) -> list[dict[str, Any]]:
    """Tokens that are found in the text before anything else is done to it; control tokens are special.

    Phi-3's, but for the first three of its vocabulary, swallow the white space behind them: GGUF has no key
    for that.
    """
    plain = {"single_word": False, "lstrip": False, "normalized": False}
    added = []
    for i, kind in enumerate(types):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            strips = is_phi3 and kind == _CONTROL and tokens[i] not in ("<unk>", "<s>", "<|endoftext|>")
            own = {"id": i, "content": tokens[i], "rstrip": strips, "special": kind != _USER_DEFINED}
            added.append({**plain, **own})
    return added


def _template(keys: Keys, tokens: Sequence[str], adds_bos: bool) -> dict[str, Any]:
    """What `add_special_tokens` puts around a text."""
    names = []
    for name, default in (("bos", adds_bos), ("eos", False)):
        is_added = keys.boolean(f"add_{name}_token", default)
        token_id = keys.optional_int(f"{name}_token_id")
        if is_added and (token_id is None or token_id >= len(tokens)):
            keys.refuse(f"{name}_token_id", "the id of a token")
        names.append((tokens[token_id], token_id) if is_added and token_id is not None else None)
    bos, eos = names
    first = [{"SpecialToken": {"id": bos[0], "type_id": 0}}] if bos else []
    last = [{"SpecialToken": {"id": eos[0], "type_id": 0}}] if eos else []
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last]
    pair = [*single, *first, {"Sequence": {"id": "B", "type_id": 0}}, *last]
    special = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (n for n in names if n)}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
