"""ModelConfig from HF configs and GGUF metadata, and what it refuses."""

import copy
import math
from typing import Any

import msgspec
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


# ---------------------------------------------------------------- families, as transformers understands them

GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
}
PHI4_MINI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "pad_token_id": 0,
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.75,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "longrope", "long_factor": [2.0] * 6, "short_factor": [1.0] * 6},
    "rope_theta": 10000.0,
    "sliding_window": 512,
    "tie_word_embeddings": True,
}
GLM4 = {
    "architectures": ["Glm4ForCausalLM"],
    "model_type": "glm4",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "pad_token_id": 0,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
MISTRAL = {
    **LLAMA,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 2,
}
QWEN2_WINDOWED = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "use_sliding_window": True,
    "sliding_window": 64,
    "max_window_layers": 1,
}


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        (GEMMA3_4B, "Gemma3Config"),
        (GEMMA2_2B, "Gemma2Config"),
        (PHI4_MINI, "Phi3Config"),
        (GLM4, "Glm4Config"),
        (QWEN2_WINDOWED, "Qwen2Config"),
        (MISTRAL, "MistralConfig"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_short_configs_mean_what_they_mean_to_transformers(keys: dict[str, Any], family: str) -> None:
    written = getattr(transformers, family).from_dict(copy.deepcopy(keys)).to_dict()
    full = ModelConfig.from_hf({**written, "architectures": keys["architectures"]})
    short = ModelConfig.from_hf(keys)
    # The classes also have default end tokens; a checkpoint that names none has none.
    same = {"eos_token_ids": [], "bos_token_id": None, "dtype": "float32"}
    assert msgspec.structs.replace(short, **same) == msgspec.structs.replace(full, **same)


def test_gemma3_from_its_short_config() -> None:
    config = ModelConfig.from_hf(GEMMA3_4B)
    assert (config.architecture, config.dtype, config.eos_token_ids) == (
        "Gemma3ForCausalLM",
        "bfloat16",
        [1, 106],
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.tie_word_embeddings) == (262208, True)
    assert config.hidden_act == "gelu_pytorch_tanh"
    assert [config.window(i) for i in range(4, 7)] == [1024, None, 1024]
    assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 1e4)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 8.0}
    assert config.attention_scale == 1 / 16


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])  # the last two in Phi-3's first months
def test_phi3_scaling_and_rotary_dim(name: str) -> None:
    config = ModelConfig.from_hf({**PHI4_MINI, "rope_scaling": {**PHI4_MINI["rope_scaling"], "type": name}})
    assert config.rotary_dim == 12
    assert config.rope_scaling == {
        "rope_type": "longrope",
        "long_factor": [2.0] * 6,
        "short_factor": [1.0] * 6,
        "original_max_position_embeddings": 256,
    }
    assert [config.window(i) for i in range(2)] == [512, 512]


def test_internlm2_calls_its_biases_otherwise() -> None:
    internlm2 = {**LLAMA, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
    scaling = {"type": "dynamic", "factor": 2.0}
    config = ModelConfig.from_hf({**internlm2, "bias": True, "rope_scaling": scaling})
    assert config.attention_bias
    assert config.rope_scaling == {"rope_type": "dynamic", "factor": 2.0}
    assert not ModelConfig.from_hf({**internlm2, "bias": False}).attention_bias


@pytest.mark.parametrize("share", [i / 98 for i in range(1, 99)])
def test_rotary_dim_survives_rounding(share: float) -> None:
    config = msgspec.structs.replace(ModelConfig.from_hf(LLAMA), head_dim=98, partial_rotary_factor=share)
    assert config.rotary_dim == round(98 * share)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer_types": ["full_attention"]},
            r"layer_types: got \['full_attention'\], expected sliding_attention",
        ),
        ({"layer_types": ["full_attention", "linear"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"sliding_window": -1}, "sliding_window: got -1"),
        (
            {"num_hidden_layers": 1 << 40},
            "num_hidden_layers: got 1099511627776, expected an integer from 1 to 1024",
        ),
        ({"hidden_size": 1 << 40}, "hidden_size: got 1099511627776"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: got 0"),
        ({"attn_logit_softcapping": "50"}, "attn_logit_softcapping"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"text_config": [1]}, "text_config"),
        (
            {
                "rope_parameters": {
                    "full_attention": {},
                    "sliding_attention": {"rope_type": "yarn", "factor": 2},
                }
            },
            "sliding_attention: got rope_type 'yarn'",
        ),
    ],
)
def test_what_families_add_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        ModelConfig.from_hf({**LLAMA, "sliding_window": 8, **change})
