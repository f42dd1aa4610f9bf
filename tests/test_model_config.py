"""ModelConfig from HF configs and GGUF metadata, and what it refuses."""

import math
from typing import Any

import pytest
import transformers

from lightllm.errors import ModelLoadError
from lightllm.model_config import ModelConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}


YARN = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 512}


def test_old_llama_config_gets_hf_defaults() -> None:
    config = ModelConfig.from_hf(LLAMA)
    assert (config.architecture, config.dtype, config.rope_theta) == ("LlamaForCausalLM", "float16", 10000.0)
    assert (config.num_key_value_heads, config.head_dim, config.tie_word_embeddings) == (4, 16, False)
    assert (config.bos_token_id, config.eos_token_ids) == (1, [2])
    assert config.rope_scaling is None


def test_generation_config_goes_first_for_end_tokens() -> None:
    config = ModelConfig.from_hf(LLAMA, {"eos_token_id": [7, 2]})
    assert config.eos_token_ids == [7, 2]
    assert ModelConfig.from_hf({**LLAMA, "eos_token_id": [2, 8]}, {"eos_token_id": 7}).eos_token_ids == [
        7,
        2,
        8,
    ]


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen2Config", "Qwen3Config", "MistralConfig"])
def test_configs_written_by_transformers_are_read(name: str) -> None:
    written = getattr(transformers, name)(
        architectures=[name.replace("Config", "ForCausalLM")], dtype="bfloat16"
    )
    config = ModelConfig.from_hf(written.to_dict())
    assert config.architecture == name.replace("Config", "ForCausalLM")
    assert config.dtype == "bfloat16"
    assert config.head_dim == (written.head_dim if name != "Qwen2Config" else 128)
    assert config.rope_theta == written.rope_parameters["rope_theta"]
    assert config.sliding_window == (4096 if name == "MistralConfig" else None)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 40}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 40}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 40, "rope_theta": 5e5}},
    ],
)
def test_all_ways_of_writing_rope_scaling(keys: dict[str, Any]) -> None:
    config = ModelConfig.from_hf({**LLAMA, **keys})
    assert (config.rope_theta, config.rope_scaling) == (5e5, YARN)


def test_default_rope_is_no_scaling() -> None:
    assert ModelConfig.from_hf({**LLAMA, "rope_parameters": {"rope_type": "default"}}).rope_scaling is None


def test_sliding_window_only_where_it_is_in_force() -> None:
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 4096}
    assert ModelConfig.from_hf(qwen).sliding_window is None
    used = {**qwen, "use_sliding_window": True}
    assert ModelConfig.from_hf(used).sliding_window is None  # bounds layers from the 28th on
    assert ModelConfig.from_hf({**used, "max_window_layers": 0}).sliding_window == 4096
    assert ModelConfig.from_hf({**LLAMA, "sliding_window": 4096}).sliding_window == 4096


REQUIRED = [key for key in LLAMA if key not in ("model_type", "bos_token_id", "eos_token_id", "torch_dtype")]


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_hf_key_is_named(key: str) -> None:
    keys = {name: value for name, value in LLAMA.items() if name != key}
    with pytest.raises(ModelLoadError, match=rf"config\.json: key '{key}' is missing"):
        ModelConfig.from_hf(keys)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("hidden_size", 0),
        ("hidden_size", -64),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", math.inf),
        ("rope_theta", 0),
        ("rope_scaling", "yarn"),
        ("rope_parameters", {"rope_theta": "x"}),
        ("tie_word_embeddings", 1),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, -1]),
        ("architectures", "LlamaForCausalLM"),
        ("torch_dtype", "int4"),
    ],
)
def test_wrong_hf_value_is_named(key: str, value: Any) -> None:
    with pytest.raises(
        ModelLoadError, match=key if "rope_p" not in key and "dtype" not in key else "rope|dtype"
    ):
        ModelConfig.from_hf({**LLAMA, key: value})


def test_head_dim_is_required_where_heads_do_not_divide() -> None:
    with pytest.raises(ModelLoadError, match="key 'head_dim' is missing"):
        ModelConfig.from_hf({**LLAMA, "num_attention_heads": 5})
    assert ModelConfig.from_hf({**LLAMA, "num_attention_heads": 5, "head_dim": 32}).head_dim == 32


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 1),
        ({"rope_type": "linear", "factor": 4.0}, 4),
        ({"rope_type": "dynamic", "factor": 2.5}, 2.5),
        ({"rope_type": "yarn", "factor": 4.0}, 4),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1),
        ({"rope_type": "llama3", "factor": 8.0}, 1),
        ({"rope_type": "longrope", "factor": 32.0}, 1),
    ],
)
def test_context_that_scaling_reaches(scaling: dict[str, Any] | None, expected: float) -> None:
    config = ModelConfig.from_hf({**LLAMA, "max_position_embeddings": 2048, "rope_scaling": scaling})
    assert config.max_context_len == expected * 2048
    with pytest.raises(ModelLoadError, match="rope_scaling: key 'factor' is missing"):
        _ = ModelConfig.from_hf({**LLAMA, "rope_scaling": {"rope_type": "linear"}}).max_context_len


def test_gemma_3_states_the_context_that_scaling_reaches() -> None:
    keys = {"architectures": ["Gemma3ForCausalLM"], "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert ModelConfig.from_hf({**LLAMA, **keys, "max_position_embeddings": 131072}).max_context_len == 131072
