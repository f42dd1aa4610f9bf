"""--quant_type on all architectures: what is rounded, and that the plain path computes exactly that."""

import logging

import msgspec
import pytest
import torch

from lightllm.layers.linear import PackedLinear
from lightllm.layers.native_linear import NativePacked
from lightllm.models import ARCHITECTURES, weight_specs
from lightllm.weights.base import PackedTensor, WeightSource
from lightllm.worker.quantization import choose_packings, quantized
from tests.models.tiny import Sequences, StateSource, config_of, load, make_oracle, source_of

PROMPT = list(range(3, 60))
NAME = "LlamaForCausalLM"


def unpacked(source: WeightSource) -> StateSource:
    """The same weights as float32: the oracle's."""
    tensors = {name: source.load(name) for name in source.names()}
    return StateSource(
        {name: t.dequantize() if isinstance(t, PackedTensor) else t for name, t in tensors.items()}
    )


@pytest.mark.parametrize("quant_type", ["w8", "w4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_quantised_model_computes_its_rounded_weights(architecture: str, quant_type: str) -> None:
    oracle = make_oracle(architecture)
    config = config_of(oracle)
    source = quantized(source_of(oracle), quant_type, config)
    model = load(config, source, packed=True)
    expected = Sequences(load(config, unpacked(source)), [PROMPT]).step({0: 57})[0]
    torch.testing.assert_close(Sequences(model, [PROMPT]).step({0: 57})[0], expected, rtol=1e-4, atol=1e-4)
    dense = load(config, source_of(oracle))
    assert model.num_bytes < (0.3 if quant_type == "w8" else 0.24) * dense.num_bytes


@pytest.mark.parametrize(("quant_type", "limit"), [("w8", 0.06), ("w4", 0.4)])
def test_logits_stay_near_those_of_the_floats(quant_type: str, limit: float) -> None:
    oracle = make_oracle(NAME)
    config = config_of(oracle)
    exact = Sequences(load(config, source_of(oracle)), [PROMPT]).step({0: 57})[0]
    for backend in ("torch", "native"):
        model = load(config, quantized(source_of(oracle), quant_type, config), packed=True, backend=backend)
        got = Sequences(model, [PROMPT]).step({0: 57})[0]
        assert ((got - exact).norm() / exact.norm()).item() < limit, backend


@pytest.mark.parametrize("quant_type", ["w8", "w4"])
def test_a_step_does_not_depend_on_its_batch(quant_type: str) -> None:
    oracle = make_oracle(NAME)
    config = config_of(oracle)
    model = load(config, quantized(source_of(oracle), quant_type, config), packed=True, backend="native")
    assert isinstance(model.layers[0].mlp.down, NativePacked)
    prompts = [PROMPT, PROMPT[::-1], PROMPT[5:]]
    alone = [Sequences(model, [prompt]).step({0: 52})[0][-1] for prompt in prompts]
    together = Sequences(model, prompts)
    chunks = [together.step({0: 20, 1: 20, 2: 20}), together.step({0: 32, 1: 32, 2: 32})]
    for row, logits in enumerate(alone):
        torch.testing.assert_close(chunks[1][row][-1], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tables_keep_8_bits(architecture: str) -> None:
    config = config_of(make_oracle(architecture))
    packings, specs = choose_packings("w4", config), weight_specs(config)
    names = {"embed", "lm_head"} & set(specs.linears)
    tables = {f"{part}.weight" for name in names for part in specs.linears[name].parts}
    assert {name for name, kind in packings.items() if kind == "Q8_0"} == tables
    assert set(packings) == {f"{part}.weight" for linear in specs.linears.values() for part in linear.parts}
    assert set(choose_packings("w8", config).values()) == {"Q8_0"}


def test_a_tied_head_is_one_table_of_8_bits() -> None:
    oracle = make_oracle(NAME, tie_word_embeddings=True)
    config = config_of(oracle)
    model = load(config, quantized(source_of(oracle), "w4", config), packed=True)
    assert model.lm_head is model.embed.weight
    assert isinstance(model.lm_head, PackedLinear)
    assert [part.type for part in model.lm_head.parts] == ["Q8_0"]
    assert [part.type for part in model.layers[1].attention.qkv.parts] == ["Q4_1"]


def test_rows_that_do_not_fill_blocks_stay_floats(caplog: pytest.LogCaptureFixture) -> None:
    oracle = make_oracle(NAME, intermediate_size=144)
    config = config_of(oracle)
    with caplog.at_level(logging.WARNING):
        source = quantized(source_of(oracle), "w8", config)
    assert "model.layers.0.mlp.down_proj.weight stays as it is: rows of 144" in caplog.text
    got = Sequences(load(config, source, packed=True), [PROMPT]).step({0: 57})[0]
    expected = Sequences(load(config, unpacked(source)), [PROMPT]).step({0: 57})[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_none_changes_nothing() -> None:
    oracle = make_oracle(NAME)
    source = source_of(oracle)
    assert quantized(source, "none", msgspec.structs.replace(config_of(oracle))) is source
