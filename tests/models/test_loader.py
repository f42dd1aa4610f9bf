"""Loading: fusion, packing, threads, progress and complaints."""

import logging
from typing import Any

import msgspec
import pytest
import torch

from lightllm.attention.registry import load_backend
from lightllm.errors import ModelLoadError
from lightllm.layers.linear import DenseLinear, PackedLinear
from lightllm.layers.ops import Ops
from lightllm.models import ARCHITECTURES, load_model, model_class
from lightllm.models.decoder import Decoder
from lightllm.models.llama import LlamaForCausalLM
from lightllm.weights.base import PackedTensor
from tests.models.tiny import Sequences, StateSource, config_of, load, make_oracle, source_of

NAME = "LlamaForCausalLM"


def packed_source(architecture: str) -> StateSource:
    """The tiny model with all linears quantised by rounding to Q8_0, except v and down in Q4_1."""
    source = source_of(make_oracle(architecture, tie_word_embeddings=True))
    for name, tensor in source.tensors.items():
        if tensor.dim() == 2:
            source.tensors[name] = pack(tensor, "Q4_1" if "v_proj" in name or "down" in name else "Q8_0")
    return source


def pack(tensor: torch.Tensor, kind: str) -> PackedTensor:
    rows, columns = tensor.shape
    blocks = tensor.view(rows, -1, 32)
    if kind == "Q8_0":
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).half()
        body = (blocks / scale.float()).round().to(torch.int8).view(torch.uint8)
        data = torch.cat([scale.view(torch.uint8), body], dim=-1)
    else:
        low = blocks.amin(-1, keepdim=True)
        scale = (blocks.amax(-1, keepdim=True) - low) / 15
        numbers = ((blocks - low) / scale).round().to(torch.uint8)
        body = numbers[..., :16] | numbers[..., 16:] << 4
        halves = [part.half().view(torch.uint8) for part in (scale, low)]
        data = torch.cat([*halves, body], dim=-1)
    return PackedTensor(kind, data.reshape(rows, -1), (rows, columns))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_and_unpacked_agree(architecture: str) -> None:
    config = config_of(make_oracle(architecture, tie_word_embeddings=True))
    source = packed_source(architecture)
    dense, packed = load(config, source), load(config, source, packed=True)
    assert packed.num_bytes < 0.4 * dense.num_bytes
    prompt = [list(range(3, 60))]
    expected = Sequences(dense, prompt).step({0: 57})[0]
    got = Sequences(packed, prompt).step({0: 57})[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_packed_parts_stay_as_they_are() -> None:
    config = config_of(make_oracle(NAME, tie_word_embeddings=True))
    dense, packed = load(config, packed_source(NAME)), load(config, packed_source(NAME), packed=True)
    assert isinstance(dense, LlamaForCausalLM)
    assert isinstance(packed, LlamaForCausalLM)
    assert isinstance(dense.layers[0].attention.qkv, DenseLinear)
    assert isinstance(packed.layers[0].attention.qkv, PackedLinear)
    assert [part.type for part in packed.layers[0].attention.qkv.parts] == ["Q8_0", "Q4_1"]


def test_rows_are_put_in_order_packed_or_not() -> None:
    """InternLM2 and GLM-4 keep rows in an order of their own."""
    for name in ("InternLM2ForCausalLM", "Glm4ForCausalLM"):
        source = packed_source(name)
        config = config_of(make_oracle(name, tie_word_embeddings=True))
        part, rows = next(iter(model_class(name).weight_specs(config).linears["0.qkv"].row_orders.items()))
        stored = source.tensors[f"{part}.weight"].dequantize()
        qkv = [load(config, source, packed=packed).layers[0].attention.qkv for packed in (False, True)]
        indices = torch.arange(len(rows))
        assert torch.equal(qkv[0].rows(indices), stored[rows])
        assert torch.equal(qkv[1].parts[0].dequantize()[: len(rows)], stored[rows])


def test_an_offset_keeps_small_weights_whole() -> None:
    name = "Gemma2ForCausalLM"
    oracle = make_oracle(name)
    source = source_of(oracle)
    source.tensors["model.norm.weight"] = torch.full((96,), 0.001953125).bfloat16()
    model = load(config_of(oracle), source, dtype=torch.bfloat16)
    assert isinstance(model, Decoder)
    assert (model.norm.weight == 1.001953125).all()


def test_tied_head_shares_the_embedding() -> None:
    oracle = make_oracle(NAME, tie_word_embeddings=True)
    model = load(config_of(oracle), source_of(oracle))
    assert isinstance(model, LlamaForCausalLM)
    assert model.lm_head is model.embed.weight
    assert model.num_bytes == sum(p.nbytes for p in oracle.parameters())


def test_fused_rows_are_in_order() -> None:
    source = source_of(make_oracle(NAME))
    model = load(config_of(make_oracle(NAME)), source)
    assert isinstance(model, LlamaForCausalLM)
    qkv = model.layers[2].attention.qkv
    assert isinstance(qkv, DenseLinear)
    parts = [source.tensors[f"model.layers.2.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(qkv.weight, torch.cat(parts))


def test_weights_are_copies() -> None:
    source = source_of(make_oracle(NAME))
    model = load(config_of(make_oracle(NAME)), source)
    before = Sequences(model, [[1, 2, 3]]).step({0: 3})[0]
    for tensor in source.tensors.values():
        tensor.zero_()
    assert torch.equal(Sequences(model, [[1, 2, 3]]).step({0: 3})[0], before)


def test_progress_counts_up() -> None:
    oracle = make_oracle(NAME)
    seen: list[tuple[int, int]] = []
    load_model(
        config_of(oracle),
        source_of(oracle),
        dtype=torch.float32,
        backend=load_backend("torch"),
        ops=Ops(),
        num_threads=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    # Embedding, head and last norm; four linears and two norms in each of three layers.
    assert seen == [(i, 21) for i in range(1, 22)]


def test_missing_tensor_is_named() -> None:
    oracle = make_oracle(NAME)
    source = source_of(oracle)
    del source.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelLoadError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load(config_of(oracle), source)


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        (
            "model.layers.0.self_attn.k_proj.weight",
            (64, 96),
            r"k_proj\.weight: got shape \[64, 96\], expected \[32, 96\]",
        ),
        ("model.norm.weight", (97,), r"model\.norm\.weight: got shape \[97\], expected \[96\]"),
        ("model.embed_tokens.weight", (133,), r"got shape \[133\], expected \[133, 96\]"),
    ],
)
def test_wrong_shape_is_named(name: str, shape: tuple[int, ...], complaint: str) -> None:
    oracle = make_oracle(NAME)
    source = source_of(oracle)
    source.tensors[name] = torch.zeros(shape)
    with pytest.raises(ModelLoadError, match=complaint):
        load(config_of(oracle), source)


def test_unused_tensors_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    oracle = make_oracle(NAME)
    source = source_of(oracle)
    source.tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(96)
    with caplog.at_level(logging.WARNING):
        load(config_of(oracle), source)
    assert "1 tensors are not used, among them model.layers.0.self_attn.q_proj.bias" in caplog.text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"architecture": "NoSuchModel"},
            r"architecture NoSuchModel is not supported; supported are .*LlamaForCausalLM",
        ),
        ({"sliding_window": 64}, "sliding_window: got 64"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type 'mrope'"),
        (
            {"attn_logit_softcapping": 30.0},
            "attn_logit_softcapping: got 30.0, LlamaForCausalLM supports None",
        ),
        ({"num_key_value_heads": 4}, r"num_key_value_heads: got 4, expected a divisor of .* \(6\)"),
    ],
)
def test_unsupported_config_is_refused_before_reading(change: dict[str, Any], complaint: str) -> None:
    config = msgspec.structs.replace(config_of(make_oracle(NAME)), **change)
    with pytest.raises(ModelLoadError, match=complaint):
        load(config, StateSource({}))
