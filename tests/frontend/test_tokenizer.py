"""The default model's tokenizer against a plain byte-pair merge, and the other kinds of GGUF vocabularies."""

import json
import shutil
import threading
import time
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm.errors import ModelLoadError, RequestError
from lightllm.frontend.gguf_vocab import byte_characters
from lightllm.frontend.tokenizer import INLINE_CHARS, Tokenizer
from lightllm.server.model_files import locate_model
from lightllm.weights.gguf import GGUFReader

METADATA = GGUFReader(locate_model().path).metadata
SMOLLM = Tokenizer.from_gguf(METADATA)

TEXTS = [
    "",
    " ",
    "What is AI?",
    "  two  spaces\tand\n\n\nlines  \n",
    "1234567890 3.14 12,000 x2 2x \u0663\u0664 \u00bd",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # don't",
    "\u4e16\u754c\u4f60\u597d\u3002\u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 caf\u00e9 cafe\u0301 \u00df \u0130",
    "I'll we've they'RE 'tis \u2019s",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <| im_end |> <|im_end",
    "\x00\x7f\u00ad\u200b\ufeff\ufffd",
    "https://example.org/a?b=c&d=%20#e \\frac{1}{2}",
]


class PlainBPE:
    """Byte-level BPE as its paper has it: split, then join the pair of lowest rank until none is left."""

    WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = metadata["tokenizer.ggml.merges"]
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        kinds = zip(self.ids, metadata["tokenizer.ggml.token_type"], strict=True)
        special = sorted((token for token, kind in kinds if kind == 3), key=len, reverse=True)
        self.special = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.special.split(text):
            if self.special.fullmatch(part):
                ids.append(self.ids[part])
                continue
            # Digits stand alone; the words are then found in what lies between them.
            for piece in regex.split(r"(\p{N})", part):
                for word in self.WORDS.findall(piece):
                    ids += self.merge(word)
        return ids

    @lru_cache(4096)  # noqa: B019 - lives as long as the module
    def merge(self, word: str) -> list[int]:
        parts = ["".join(byte_characters()[byte]) for byte in word.encode()]
        while len(parts) > 1:
            pairs = [self.ranks.get(pair, 1 << 60) for pair in pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] == 1 << 60:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return [self.ids[part] for part in parts]


PLAIN = PlainBPE(METADATA)


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_equals_plain_merging(text: str) -> None:
    assert SMOLLM.encode(text) == PLAIN.encode(text)


# The vocabulary has no token for these bytes (no text in use holds them): they vanish, as with the original.
MISSING_BYTES = frozenset(
    byte for byte, char in enumerate(byte_characters()) if char not in METADATA["tokenizer.ggml.tokens"]
)


def has_all_bytes(text: str) -> bool:
    return not MISSING_BYTES & set(text.encode())


@settings(max_examples=200)
@given((st.text() | st.text("ab 1\n'strl\u4e16\U0001f600", max_size=60)).filter(has_all_bytes))
def test_any_text_encodes_as_plain_merging_and_decodes_to_itself(text: str) -> None:
    ids = SMOLLM.encode(text)
    assert ids == PLAIN.encode(text)
    assert SMOLLM.decode(ids, skip_special_tokens=False) == text
    assert b"".join(SMOLLM.token_bytes(i) for i in ids) == text.encode()


def test_bytes_without_a_token_vanish() -> None:
    assert 0xF1 in MISSING_BYTES
    assert all(byte >= 0xC0 or byte < 0x20 for byte in MISSING_BYTES)
    assert b"".join(SMOLLM.token_bytes(i) for i in SMOLLM.encode("a\U00040000")) == b"a\x80\x80\x80"


def test_known_ids_of_the_default_model() -> None:
    assert SMOLLM.encode("<|im_start|>user\n") == [1, 4093, 198]
    assert (SMOLLM.vocab_size, SMOLLM.bos_token_id, SMOLLM.eos_token_ids) == (49152, 1, [2])
    assert SMOLLM.special_ids == frozenset(range(17))


def test_default_model_adds_nothing_around_a_text() -> None:
    assert SMOLLM.encode("hi", add_special_tokens=True) == SMOLLM.encode("hi", add_special_tokens=False)


def test_special_tokens_are_skipped_on_request() -> None:
    ids = SMOLLM.encode("<|im_start|>user\nhi<|im_end|>")
    assert SMOLLM.decode(ids) == "user\nhi"
    assert SMOLLM.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>"


def test_tokens_as_text_and_bytes() -> None:
    (first, second) = SMOLLM.encode("\u4e16")[:2]
    assert SMOLLM.token_bytes(first) + SMOLLM.token_bytes(second) != b""
    assert SMOLLM.token_str(first) == "\ufffd"
    assert SMOLLM.token_str(2) == "<|im_end|>"
    assert SMOLLM.token_str(SMOLLM.encode(" is")[0]) == " is"
    assert SMOLLM.token_bytes(10**6) == b""
    assert SMOLLM.decode([10**6]) == ""


def test_byte_characters_are_those_of_the_library() -> None:
    assert set(byte_characters()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert len(set(byte_characters())) == 256


def test_lone_surrogates_are_a_request_error() -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        SMOLLM.encode("a\ud800b")


# ---------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    SMOLLM.backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copy(saved / "tokenizer.json", tmp_path)
    return tmp_path


def test_folder_gives_the_same_ids(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ 1 }}"}
        )
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.special_ids) == (
        1,
        [2],
        SMOLLM.special_ids,
    )
    assert all(tokenizer.encode(text) == SMOLLM.encode(text) for text in TEXTS)
    assert tokenizer.token_bytes(4093) == b"user"
    assert tokenizer.apply_chat_template([]) == "1"


def test_special_tokens_map_is_the_fallback(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (None, [2])
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json; pass --tokenizer_dir"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_named(folder: Path, name: str) -> None:
    (folder / name).write_text('{"version": ')
    with pytest.raises(ModelLoadError, match=name):
        Tokenizer.from_folder(folder)


def test_slow_mode_converts_with_transformers(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert Tokenizer.from_folder(folder, mode="slow").encode("hello 12") == SMOLLM.encode("hello 12")


def test_auto_mode_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=str(tmp_path)):
        Tokenizer.from_folder(tmp_path, mode="auto")


def test_long_texts_are_encoded_alike_while_other_threads_go_on() -> None:
    text = "".join(f"{number} strange, short words; " for number in range(20_000))
    assert len(text) > 100 * INLINE_CHARS
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(SMOLLM.encode(text)))
    thread.start()
    num_turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        num_turns += 1
    assert num_turns > 10
    assert found == [SMOLLM.backend.encode(text).ids]


def test_a_long_text_with_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        SMOLLM.encode("x" * INLINE_CHARS + "\ud800")
