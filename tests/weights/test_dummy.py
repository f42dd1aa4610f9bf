"""Dummy weights: the right names for each architecture, and the same values every time."""

from typing import Any

import msgspec
import pytest
import torch
import transformers

from lightllm.errors import ModelLoadError
from lightllm.model_config import ModelConfig
from lightllm.models import ARCHITECTURES, tensor_shapes
from lightllm.weights.dummy import DummySource

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
)


def source(seed: int = 0, **changes: Any) -> DummySource:
    config = msgspec.structs.replace(CONFIG, **changes)
    return DummySource(tensor_shapes(config), config.dtype, seed)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if hasattr(transformers, name)])
@pytest.mark.parametrize("is_tied", [False, True])
def test_names_and_shapes_are_those_of_transformers(architecture: str, is_tied: bool) -> None:
    model_class = getattr(transformers, architecture)
    keys = {name: getattr(CONFIG, name) for name in ModelConfig.__struct_fields__[1:10]}
    with torch.device("meta"):
        model = model_class(model_class.config_class(**keys, tie_word_embeddings=is_tied, pad_token_id=0))
    config = ModelConfig.from_hf({**model.config.to_dict(), "architectures": [architecture]})
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert tensor_shapes(config) == expected
    made = DummySource(tensor_shapes(config), "float32")
    assert {name: made.shape(name) for name in made.names()} == expected


def test_biases_follow_the_config() -> None:
    biases = [name for name in source(attention_bias=True, mlp_bias=True).names() if name.endswith("bias")]
    assert len(biases) == 2 * 7


def test_values_depend_on_seed_and_name_alone() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    first = source().load(name)
    assert torch.equal(first, source().load(name))
    assert not torch.equal(first, source(seed=1).load(name))
    assert not torch.equal(first, source().load("model.layers.0.mlp.up_proj.weight"))
    assert first.std().item() == pytest.approx(0.02, rel=0.05)


def test_norms_are_one_and_dtype_is_the_config_s() -> None:
    made = source(dtype="bfloat16")
    assert torch.equal(made.load("model.norm.weight"), torch.ones(64, dtype=torch.bfloat16))
    assert made.load("lm_head.weight").dtype == torch.bfloat16


def test_unknown_architectures_and_names_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="architecture MambaForCausalLM is not supported"):
        source(architecture="MambaForCausalLM")
    with pytest.raises(ModelLoadError, match="no tensor ghost"):
        source().load("ghost")
