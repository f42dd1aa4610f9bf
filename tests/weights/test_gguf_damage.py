"""Damaged GGUF files: one clear error that names the file, whatever is wrong with it; never a crash."""

import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightllm.attention.registry import load_backend
from lightllm.errors import ModelLoadError
from lightllm.frontend.gguf_vocab import byte_characters
from lightllm.layers.ops import Ops
from lightllm.models import load_model
from lightllm.server.model_files import ModelFiles, describe_files, open_tokenizer, open_weights
from lightllm.weights.gguf import GGUFReader
from tests.weights.synthetic import random_blocks, write_gguf

METADATA = {
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 32,
    "llama.block_count": 1,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 64,
    "llama.rope.dimension_count": 16,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": [*byte_characters(), "ab", "<s>"],
    "tokenizer.ggml.token_type": [1] * 257 + [3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 257,
    "tokenizer.ggml.eos_token_id": 257,
    "tokenizer.chat_template": "{{ messages }}",
}
SHAPES = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
SHAPES |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), (32, 32))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that loads: one layer, packed and plain tensors, a tokenizer."""
    norm = np.ones(32, np.float32)
    tensors: dict[str, object] = {"token_embd.weight": (random_blocks("Q8_0", 258, 1), "Q8_0")}
    tensors |= {f"blk.0.{n}.weight": (random_blocks("Q4_0", s[0], 1), "Q4_0") for n, s in SHAPES.items()}
    tensors |= {"rope_freqs.weight": np.ones(8, np.float32), "output_norm.weight": norm}
    tensors |= {"blk.0.attn_norm.weight": norm, "blk.0.ffn_norm.weight": norm}
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", tensors, METADATA)
    read_all(path)
    return path


def read_all(path: Path) -> None:
    """All that a server does with a file before it takes requests."""
    files = ModelFiles(kind="gguf", path=path, name="m")
    described = describe_files(files)
    open_tokenizer(files).encode("abc<s>")
    load_model(
        described.config,
        open_weights(described),
        dtype=torch.float32,
        backend=load_backend("torch"),
        ops=Ops(),
        num_threads=1,
        progress=lambda done, total: None,
    )


def is_refused(path: Path) -> bool:
    try:
        read_all(path)
    except ModelLoadError as error:
        message = str(error)
    else:
        return False
    assert path.name in message
    assert "\n" not in message
    return True


def test_every_truncation_is_an_error_naming_the_file(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    start = min(tensor.offset for tensor in GGUFReader(whole).tensors.values())
    for size in [*range(start), *range(start, len(data) - 32, 97)]:  # the last 32 bytes may be padding
        cut.write_bytes(data[:size])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
            GGUFReader(cut)


SPECIAL = [struct.pack("<Q", n) for n in (0, 1, 31, 1 << 20, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)]
PATCHES = (
    st.binary(min_size=1, max_size=12)
    | st.sampled_from(SPECIAL)
    | st.sampled_from(SPECIAL).map(lambda b: b[:4])
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(place=st.floats(0, 1), patch=PATCHES)
def test_changed_bytes_give_a_model_or_a_clear_error(whole: Path, place: float, patch: bytes) -> None:
    data = bytearray(whole.read_bytes())
    position = int(place * (len(data) - len(patch)))
    data[position : position + len(patch)] = patch
    changed = whole.with_name("changed.gguf")
    changed.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    is_refused(changed)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024, "KiB"


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_noise_behind_the_magic_is_refused(whole: Path, noise: bytes) -> None:
    path = whole.with_name("noise.gguf")
    for version in (1, 2, 3):
        path.write_bytes(b"GGUF" + struct.pack("<I", version) + noise)
        assert is_refused(path)


@pytest.mark.parametrize("name", list(METADATA))
@pytest.mark.parametrize("value", [-1, 0, 1 << 31, "x", 1.5, True, [7], ["x"]], ids=str)
def test_wrong_metadata_is_refused_or_harmless(whole: Path, name: str, value: object) -> None:
    if isinstance(value, int) and value < 0:
        value = [value]  # the writer of these tests writes integers unsigned
    path = write_gguf(whole.with_name("wrong.gguf"), {}, {**METADATA, name: value})
    assert is_refused(path)  # if not for the value, then for the tensors, of which there are none


def keys(name: bytes, kind: int, value: bytes, count: int = 1) -> bytes:
    """A file with one metadata key, `count` times."""
    one = struct.pack(f"<Q{len(name)}sI", len(name), name, kind) + value
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + one * count + bytes(99)


def two_tensors() -> bytes:
    one = struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + one * 2 + bytes(99)


def one_tensor(num_dims: int, dim: int, kind: int, offset: int) -> bytes:
    """A file whose tensor table says this of its one tensor, t."""
    return b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", num_dims, dim, kind, offset) + bytes(99)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(40), "version: got 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(40), "claims 1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + bytes(40), "beyond the end"),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 62) + bytes(40),
            "4611686018427387904 values; at most",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 20) + bytes(40),
            "1048576 strings, beyond the end",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 20) + bytes(40),
            "1048576 values, beyond the end",
        ),
        (keys(b"general.alignment", 4, struct.pack("<I", 33)), "alignment: got 33, expected a power of two"),
        (keys(b"general.alignment", 4, struct.pack("<I", 0)), "alignment: got 0"),
        (keys(b"general.alignment", 8, struct.pack("<Q1s", 1, b"8")), "alignment: got '8'"),
        (keys(b"k", 4, bytes(4), count=2), "key 'k' stands twice"),
        (two_tensors(), "tensor t stands twice"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1) + bytes(40), "k: value type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77) + bytes(40), "k: value type 77"),
        (b"GGUF" + struct.pack("<IQQQ2sI", 3, 0, 1, 2, b"\xff\xfe", 4) + bytes(40), "not UTF-8"),
        (one_tensor(1, 256, 16, 0), "tensor t: got type IQ2_XXS, expected one of F32, F16"),
        (one_tensor(1, 256, 39, 0), "tensor t: got type MXFP4"),
        (one_tensor(1, 256, 15, 0), "tensor t: got type Q8_K"),
        (one_tensor(1, 64, 99, 0), "type number 99"),
        (one_tensor(1, 40, 2, 0), "multiple of 32"),
        (one_tensor(9, 40, 0, 0), "9 dimensions"),
        (one_tensor(1, 0, 0, 0), "no zero"),
        (
            one_tensor(1, 4, 0, 5),
            "expected a multiple",
        ),
        (
            one_tensor(1, 1 << 63, 0, 0),
            "t needs bytes",
        ),
    ],
)
def test_absurd_headers_are_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(header)
    with pytest.raises(ModelLoadError, match=message) as caught:
        GGUFReader(path)
    assert str(path) in str(caught.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path / "empty.gguf"):
        with pytest.raises(ModelLoadError, match=path.name):
            GGUFReader(path)
        (tmp_path / "empty.gguf").touch()
