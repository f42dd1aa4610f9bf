"""Tokenizers from GGUF metadata: splits against plain regular expressions, encoding against transformers."""

import json
import random
from itertools import pairwise
from typing import Any

import pytest
import regex
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import generate_merges

from lightllm.errors import ModelLoadError
from lightllm.frontend.gguf_vocab import byte_characters
from lightllm.frontend.tokenizer import Tokenizer


def tiny_bpe(split: str, **extra: Any) -> dict[str, Any]:
    """Bytes, one special token and two merges."""
    tokens = [*byte_characters(), "<s>", "ab", "abc"]
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 256,
    }
    return {**keys, **{f"tokenizer.ggml.{name}": value for name, value in extra.items()}}


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "x12345  y", ["x", "12345", " ", " y"]),
        ("smollm", "x123 y", ["x", "1", "2", "3", " y"]),
        ("llama-bpe", "x12345  y\n\n.z", ["x", "123", "45", " ", " y", "\n\n", ".z"]),
        ("qwen2", "x12 y'LL", ["x", "1", "2", " y", "'LL"]),
    ],
)
def test_splits_before_merging(pre: str, text: str, pieces: list[str]) -> None:
    backend = Tokenizer.from_gguf(tiny_bpe(pre)).backend
    cut = backend.pre_tokenizer.pre_tokenize_str(text)
    assert [piece.replace("\u0120", " ").replace("\u010a", "\n") for piece, _ in cut] == pieces


def test_llama_bpe_takes_whole_tokens_and_adds_bos() -> None:
    assert Tokenizer.from_gguf(tiny_bpe("llama-bpe")).encode("abc") == [256, 258]
    assert Tokenizer.from_gguf(tiny_bpe("llama-bpe", add_bos_token=False)).encode("abc") == [258]
    assert Tokenizer.from_gguf(tiny_bpe("gpt-2")).encode("abc") == [257, ord("c")]
    assert Tokenizer.from_gguf(tiny_bpe("gpt-2", add_bos_token=True)).encode("c") == [256, ord("c")]
    assert Tokenizer.from_gguf(tiny_bpe("llama-bpe")).encode("abc", add_special_tokens=False) == [258]


def test_qwen2_normalizes() -> None:
    tokenizer = Tokenizer.from_gguf(tiny_bpe("qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "viking"}, "tokenizer.ggml.pre: got 'viking', expected one of chatglm-bpe"),
        ({"pre": None}, "tokenizer.ggml.pre: got None"),
        ({"model": "t5"}, "tokenizer.ggml.model: got 't5', expected gpt2 or llama; pass --tokenizer_dir"),
        ({"model": 5}, "tokenizer.ggml.model: got 5"),
        ({"tokens": []}, "has no tokenizer"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens: got .1, 2."),
        ({"token_type": [1]}, "token_type: got 1 entries, expected 259"),
        ({"token_type": ["1"] * 259}, "token_type: got"),
        ({"merges": [1]}, "merges: got .1."),
        ({"model": "llama", "scores": ["x"] * 259}, "scores: got"),
        ({"model": "llama"}, "scores: got 0 entries, expected 259"),
        ({"add_bos_token": "yes"}, "add_bos_token: got 'yes', expected true or false"),
        ({"eos_token_id": "2"}, "eos_token_id: got '2'"),
        ({"tokens": ["a"] * 259}, "got 258 repeated tokens"),
        ({"merges": ["a nothing"]}, "no consistent tokenizer"),
        ({"add_bos_token": True, "bos_token_id": 5000}, "bos_token_id: got 5000"),
    ],
)
def test_vocabularies_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        Tokenizer.from_gguf(tiny_bpe("gpt-2", **change), origin="x.gguf")
    assert "x.gguf" in str(caught.value)


SPACE = "\u2581"
SPM_PIECES = [(c, -50.0 - i) for i, c in enumerate(f"abcdeh{SPACE}")]
SPM_PIECES += [
    ("ab", -2.0),
    ("bc", -1.0),
    ("abc", -3.0),
    (f"{SPACE}a", -4.0),
    ("he", -5.0),
    (f"{SPACE}he", -6.0),
]
SPM_TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *(p for p, _ in SPM_PIECES),
]
SPM: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": SPM_TOKENS,
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(SPM_PIECES)],
    "tokenizer.ggml.scores": [0.0] * 259 + [score for _, score in SPM_PIECES],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def plain_sentencepiece(text: str) -> list[int]:
    """Join the adjacent pair whose token has the best score, leftmost first; bytes for what is left over."""
    scores = dict(SPM_PIECES)
    parts = list(SPACE + text.replace(" ", SPACE)) if text else []
    while True:
        joined = [a + b for a, b in pairwise(parts)]
        pairs = [(-scores[token], i) for i, token in enumerate(joined) if token in scores]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [
        i
        for part in parts
        for i in ([SPM_TOKENS.index(part)] if part in scores else [b + 3 for b in part.encode()])
    ]


@given(st.text("abcdeh \u4e16", max_size=30))
def test_sentencepiece_encodes_as_plain_merging(text: str) -> None:
    tokenizer = Tokenizer.from_gguf(SPM)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == plain_sentencepiece(text)
    assert tokenizer.encode(text) == [1, *ids]
    assert tokenizer.decode([1, *ids]) == text


def test_sentencepiece_bytes() -> None:
    tokenizer = Tokenizer.from_gguf(SPM)
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("\u4e16")] == [
        b"<s>",
        b" ",
        b"\xe4",
        b"\xb8",
        b"\x96",
    ]
    assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode("a\u4e16")[1:]) == " a\u4e16".encode()


# The patterns of the original tokenizers, as their files or llama.cpp's source have them; applied one after
# the other, each cuts what the ones before it left into matches and rests.
CASELESS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = rf"{CASELESS}|{WORD}|\p{{N}}{{1,3}}|{TAIL}"
QWEN = rf"{CASELESS}|{WORD}|\p{{N}}|{TAIL}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}|{SLASHED}"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CASELESS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CASELESS}?"
    rf"|\p{{N}}{{1,3}}|{SLASHED}"
)
ORIGINAL_SPLITS = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "dbrx": [LLAMA3],
    "glm4": [LLAMA3],
    "qwen2": [QWEN],
    "tekken": [TEKKEN],
    "gpt-4o": [GPT4O],
    "deepseek-coder": [
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ],
}
MIXED = st.text("aBc \n\r\t'sLl123.,!$+/_\u00e9\u0301\u4e16\u0663\u00bd\U0001f600", max_size=40)


def cut(patterns: list[str], text: str) -> list[str]:
    pieces = [text]
    for pattern in patterns:
        pieces = [part for piece in pieces for part in regex.split(f"({pattern})", piece) if part]
    return pieces


SPLITTERS = {pre: Tokenizer.from_gguf(tiny_bpe(pre)).backend for pre in ORIGINAL_SPLITS}


@pytest.mark.parametrize("pre", ORIGINAL_SPLITS)
@settings(max_examples=100)
@given(text=MIXED)
def test_splits_are_those_of_the_originals(pre: str, text: str) -> None:
    table = {char: byte for byte, char in enumerate(byte_characters())}
    pieces = SPLITTERS[pre].pre_tokenizer.pre_tokenize_str(text)
    assert [bytes(map(table.__getitem__, piece)).decode() for piece, _ in pieces] == cut(
        ORIGINAL_SPLITS[pre], text
    )


# ---------------------------------------------------------------- against transformers

random.seed(0)
WORDS = ["".join(random.choices("abcdefgh", k=random.randint(1, 6))) for _ in range(300)]
CORPUS = [" ".join(random.choices(WORDS, k=20)) + f" {i}, x\u00e9\u4e16!\n" for i in range(200)]


def trained(byte_level: bool) -> tuple[list[str], list[str]]:
    """Vocabulary in order and merges of a small BPE."""
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=list(byte_characters()) if byte_level else [], show_progress=False
    )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = (
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        if byte_level
        else tokenizers.pre_tokenizers.Metaspace()
    )
    backend.train_from_iterator(CORPUS, trainer)
    vocab = backend.get_vocab()
    return sorted(vocab, key=vocab.__getitem__), [
        " ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]
    ]


TEXTS = st.text("abcdefgh 1,!\n\u00e9\u4e16\U0001f600", max_size=60) | st.sampled_from(CORPUS)
BYTE_TOKENS, BYTE_MERGES = trained(byte_level=True)
BYTE_GGUF = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [*BYTE_TOKENS, "<|endoftext|>", "<|im_end|>"],
    "tokenizer.ggml.token_type": [1] * len(BYTE_TOKENS) + [3, 3],
    "tokenizer.ggml.merges": BYTE_MERGES,
}


@pytest.mark.parametrize(("pre", "family"), [("qwen2", "Qwen2Tokenizer"), ("gpt-2", "GPT2Tokenizer")])
def test_byte_level_vocabularies_encode_as_transformers(pre: str, family: str) -> None:
    vocab = {token: i for i, token in enumerate(BYTE_GGUF["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in BYTE_MERGES]
    oracle = getattr(transformers, family)(vocab=vocab, merges=merges)
    oracle.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    ours = Tokenizer.from_gguf({**BYTE_GGUF, "tokenizer.ggml.pre": pre})

    @settings(max_examples=200)
    @given(TEXTS)
    def check(text: str) -> None:
        text = f"{text}<|im_end|>{text}"
        ids = oracle.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids, skip_special_tokens=False) == oracle.decode(ids)

    check()


PIECES, _ = trained(byte_level=False)
PIECES = [piece for piece in PIECES if piece != SPACE] + [SPACE]
CONTROLS = {"llama": ["<unk>", "<s>", "</s>"], "gemma": ["<pad>", "<eos>", "<bos>", "<unk>"]}


def spm_gguf(family: str, **extra: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: control tokens, bytes, pieces with scores that fall with the rank."""
    control = CONTROLS[family]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    types = [2 if token == "<unk>" else 3 for token in control]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [*types, *[6] * 256, *[1] * len(PIECES)],
        "scores": [0.0] * (len(control) + 256) + [-float(i) for i in range(len(PIECES))],
        "bos_token_id": control.index("<s>" if family == "llama" else "<bos>"),
        **extra,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()}


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_sentencepiece_vocabularies_encode_as_transformers(family: str) -> None:
    metadata = spm_gguf(family, add_space_prefix=family == "llama")
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    scored = {piece: scores[vocab[piece]] for piece in PIECES}
    cls = transformers.LlamaTokenizer if family == "llama" else transformers.GemmaTokenizer
    oracle = cls(vocab=vocab, merges=generate_merges(vocab, scored))
    ours = Tokenizer.from_gguf(metadata)

    @settings(max_examples=200)
    @given(TEXTS)
    def check(text: str) -> None:
        if family == "llama":
            text = text.lstrip(" ")  # transformers puts no prefix before a space, SentencePiece does
        ids = oracle.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.encode(text) == [metadata["tokenizer.ggml.bos_token_id"], *ids]
        assert ours.decode(ids) == oracle.decode(ids)

    check()


def test_phi3_control_tokens_swallow_what_follows() -> None:
    metadata = spm_gguf("llama", tokens=[*spm_gguf("llama")["tokenizer.ggml.tokens"], "<|user|>", "<|x|>"])
    for name, values in (("token_type", [3, 4]), ("scores", [-1000.0, -1000.0])):
        metadata[f"tokenizer.ggml.{name}"] += values
    user = len(metadata["tokenizer.ggml.tokens"]) - 2
    plain = Tokenizer.from_gguf(metadata)
    phi3 = Tokenizer.from_gguf({**metadata, "general.architecture": "phi3"})
    for text, is_stripped in (("<|user|>\n a", True), ("<s>\n a", False), ("<|x|>\n a", False)):
        before, after = text.split("\n")
        stripped = phi3.encode(before + after.strip(), add_special_tokens=False)
        assert (phi3.encode(text, add_special_tokens=False) == stripped) is is_stripped
    assert plain.encode("<|user|>\n a", add_special_tokens=False)[:1] == [user]
    assert len(plain.encode("<|user|>\n a")) > len(phi3.encode("<|user|>\n a"))


def test_user_defined_tokens_with_spaces_are_found_in_the_text() -> None:
    # The converter of Gemma's vocabulary writes runs of spaces as spaces.
    metadata = spm_gguf("gemma", add_space_prefix=False)
    metadata["tokenizer.ggml.tokens"] += ["   ", "\n\n"]
    metadata["tokenizer.ggml.token_type"] += [4, 4]
    metadata["tokenizer.ggml.scores"] += [-1000.0, -1000.0]
    tokenizer = Tokenizer.from_gguf(metadata)
    size = len(metadata["tokenizer.ggml.tokens"])
    ids = tokenizer.encode("a   b\n\n", add_special_tokens=False)
    assert ids[1], ids[-1] == (size - 2, size - 1)
    assert tokenizer.decode(ids) == "a   b\n\n"


def test_empty_tokens_are_holes() -> None:
    metadata = spm_gguf("llama")
    metadata["tokenizer.ggml.tokens"][-3] = metadata["tokenizer.ggml.tokens"][-5] = ""
    assert Tokenizer.from_gguf(metadata).decode(Tokenizer.from_gguf(metadata).encode("abc")) == "abc"
