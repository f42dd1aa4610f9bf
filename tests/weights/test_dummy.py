"""Dummy weights: the right names for each architecture, and the same values every time."""

import msgspec
import pytest
import torch
import transformers

from lightllm.errors import ModelLoadError
from lightllm.model_config import ModelConfig
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


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3", "Glm4"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_names_and_shapes_are_those_of_transformers(family: str, is_tied: bool, has_bias: bool) -> None:
    architecture = f"{family}ForCausalLM"
    has_bias = has_bias and family not in ("Mistral", "Phi3")  # transformers gives them none
    config = msgspec.structs.replace(
        CONFIG, architecture=architecture, tie_word_embeddings=is_tied, attention_bias=has_bias
    )
    model_class = getattr(transformers, architecture)
    keys = {name: getattr(config, name) for name in ModelConfig.__struct_fields__[1:10]}
    keys |= {"pad_token_id": 0, "tie_word_embeddings": is_tied, "attention_bias": has_bias}
    with torch.device("meta"):
        model = model_class(model_class.config_class(**keys))
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    source = DummySource(config)
    assert {name: source.shape(name) for name in source.names()} == expected


def test_internlm2_has_names_of_its_own() -> None:
    config = msgspec.structs.replace(CONFIG, architecture="InternLM2ForCausalLM", num_hidden_layers=1)
    source = DummySource(config)
    assert {name: source.shape(name) for name in source.names()} == {
        "model.tok_embeddings.weight": (128, 64),
        "model.layers.0.attention.wqkv.weight": (64 + 2 * 32, 64),
        "model.layers.0.attention.wo.weight": (64, 64),
        "model.layers.0.feed_forward.w1.weight": (96, 64),
        "model.layers.0.feed_forward.w3.weight": (96, 64),
        "model.layers.0.feed_forward.w2.weight": (64, 96),
        "model.layers.0.attention_norm.weight": (64,),
        "model.layers.0.ffn_norm.weight": (64,),
        "model.norm.weight": (64,),
        "output.weight": (128, 64),
    }


def test_biases_follow_the_config() -> None:
    config = msgspec.structs.replace(CONFIG, attention_bias=True, mlp_bias=True)
    biases = [name for name in DummySource(config).names() if name.endswith("bias")]
    assert len(biases) == 2 * 7


def test_values_depend_on_seed_and_name_alone() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    first = DummySource(CONFIG).load(name)
    assert torch.equal(first, DummySource(CONFIG).load(name))
    assert not torch.equal(first, DummySource(CONFIG, seed=1).load(name))
    assert not torch.equal(first, DummySource(CONFIG).load("model.layers.0.mlp.up_proj.weight"))
    assert first.std().item() == pytest.approx(0.02, rel=0.05)


def test_norms_are_one_and_dtype_is_the_config_s() -> None:
    source = DummySource(msgspec.structs.replace(CONFIG, dtype="bfloat16"))
    assert torch.equal(source.load("model.norm.weight"), torch.ones(64, dtype=torch.bfloat16))
    assert source.load("lm_head.weight").dtype == torch.bfloat16


def test_unknown_architectures_and_names_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="got architecture MambaForCausalLM"):
        DummySource(msgspec.structs.replace(CONFIG, architecture="MambaForCausalLM"))
    with pytest.raises(ModelLoadError, match="no tensor ghost"):
        DummySource(CONFIG).load("ghost")
