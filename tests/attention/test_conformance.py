"""Every backend of the registry against the oracle, over shapes of batches and layouts of slots."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllm.attention.base import AttentionLayer
from lightllm.attention.native import NativeAttention
from lightllm.attention.registry import BACKENDS, ORACLE, load_backend
from lightllm.attention.self_check import START_CASE, Case, compare
from lightllm.model_config import ModelConfig
from tests.native.available import library_or_skip

HEADS = ((9, 3, 64), (4, 4, 32), (8, 1, 16))
DTYPES = (torch.float32, torch.bfloat16)


def runs(*parts: tuple[int, int]) -> tuple[int, ...]:
    """Slots of runs given as (start, length)."""
    return tuple(slot for start, length in parts for slot in range(start, start + length))


CASES = {
    "start": START_CASE,
    "decode one, short": Case((5,), (1,), runs((1, 5))),
    "decode one, first token": Case((1,), (1,), (7,)),
    "decode one, long": Case((700,), (1,), runs((3, 700))),
    "decode group": Case((3, 4, 80, 65, 128, 1), (1,) * 6, runs((1, 281))),
    "decode, regions of 64": Case(
        (300, 310), (1, 1), runs(*((1 + 64 * i, 64) for i in range(9, 0, -1)), (700, 34))
    ),
    "decode, long prefix and regions": Case((520,), (1,), runs((100, 400), (10, 60), (600, 60))),
    "decode, two long runs": Case((800,), (1,), runs((500, 400), (1, 400))),
    "whole prompt": Case((70,), (70,), runs((1, 70))),
    "chunk after one run": Case((90,), (20,), runs((1, 90))),
    "chunk after fragments": Case((90,), (30,), runs((50, 11), (3, 22), (90, 30), (30, 20), (200, 7))),
    "chunk after long runs and fragments": Case(
        (650,), (2,), runs((300, 300), (1, 260), (700, 50), (800, 40))
    ),
    "shared prefix": Case(
        (300, 310, 70), (1, 5, 1), runs((1, 280), (300, 20), (1, 280), (400, 30), (1, 60), (500, 10))
    ),
    "mixed": Case((33, 70, 12, 500, 6), (33, 5, 1, 1, 1), runs((10, 621))),
}

# What a layer may ask for beside the defaults; scores are about 1, so that each of these changes results.
LAYERS = {
    "scale": AttentionLayer(0, 0.31),
    "window 1": AttentionLayer(0, 0.25, window=1),
    "window 37": AttentionLayer(0, 0.25, window=37),
    "window 290": AttentionLayer(0, 0.25, window=290),
    "softcap": AttentionLayer(0, 0.25, softcap=0.7),
    "all": AttentionLayer(0, 0.2, window=65, softcap=1.5),
}


def config(num_q_heads: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=num_q_heads * head_dim,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=num_q_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=8,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
    )


@pytest.fixture(params=[name for name in BACKENDS if name != ORACLE])
def backend_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("heads", HEADS)
def test_agrees_with_oracle(
    backend_name: str, heads: tuple[int, int, int], case: Case, dtype: torch.dtype
) -> None:
    if backend_name == "native" and not NativeAttention.supports(dtype, heads[2], heads[0] // heads[1]):
        pytest.skip("refused by select_backend")
    backend = load_backend(backend_name, library_or_skip() if backend_name == "native" else None)
    assert compare(backend, load_backend(ORACLE), case, config(*heads), dtype) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_every_kind_of_layer_agrees_with_oracle(
    backend_name: str, layer: AttentionLayer, case: Case, dtype: torch.dtype
) -> None:
    if backend_name == "native" and not NativeAttention.supports(dtype, 16, 3):
        pytest.skip("refused by select_backend")
    backend = load_backend(backend_name, library_or_skip() if backend_name == "native" else None)
    assert compare(backend, load_backend(ORACLE), case, config(6, 2, 16), dtype, layer=layer) is None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    seq_lens = draw(st.lists(st.integers(1, 400), min_size=1, max_size=6))
    query_lens = [draw(st.one_of(st.just(1), st.integers(1, seq_len))) for seq_len in seq_lens]
    # Cut the slots into pieces and shuffle those: runs of all lengths, in any order.
    total = sum(seq_lens)
    cuts = sorted(draw(st.sets(st.integers(1, total), max_size=20)) | {0, total})
    pieces = draw(st.permutations([range(a + 1, b + 1) for a, b in itertools.pairwise(cuts)]))
    return Case(tuple(seq_lens), tuple(query_lens), tuple(slot for piece in pieces for slot in piece))


@st.composite
def layers(draw: st.DrawFn) -> AttentionLayer:
    window = draw(st.none() | st.integers(1, 450))
    softcap = draw(st.none() | st.floats(0.5, 50.0))
    return AttentionLayer(0, draw(st.floats(0.05, 0.5)), window, softcap)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != ORACLE])
@given(case=cases(), layer=layers())
@settings(max_examples=40)
def test_agrees_with_oracle_on_any_layout(name: str, case: Case, layer: AttentionLayer) -> None:
    backend = load_backend(name, library_or_skip() if name == "native" else None)
    problem = compare(backend, load_backend(ORACLE), case, config(6, 2, 16), torch.float32, layer=layer)
    assert problem is None
