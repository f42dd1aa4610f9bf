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
GGUF = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 512,
    "tokenizer.ggml.tokens": ["a", "b", "<|im_end|>"],
    "tokenizer.ggml.eos_token_id": 1,
}


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
    assert (config.rope_theta, config.rope_scaling) == (5e5, {"rope_type": "yarn", "factor": 40})


def test_default_rope_is_no_scaling() -> None:
    assert ModelConfig.from_hf({**LLAMA, "rope_parameters": {"rope_type": "default"}}).rope_scaling is None


def test_sliding_window_only_where_it_is_in_force() -> None:
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 4096}
    assert ModelConfig.from_hf(qwen).sliding_window is None
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": True}).sliding_window == 4096
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


def test_gguf_metadata() -> None:
    config = ModelConfig.from_gguf(GGUF)
    assert (config.architecture, config.dtype) == ("LlamaForCausalLM", "float32")
    assert (config.vocab_size, config.head_dim, config.num_key_value_heads) == (3, 16, 2)
    assert config.tie_word_embeddings
    assert not ModelConfig.from_gguf(GGUF, has_lm_head=True).tie_word_embeddings


def test_gguf_end_of_turn_tokens_are_end_tokens() -> None:
    assert ModelConfig.from_gguf(GGUF).eos_token_ids == [1]
    template = {"tokenizer.chat_template": "{{ x }}<|im_end|>"}
    assert ModelConfig.from_gguf({**GGUF, **template}).eos_token_ids == [1, 2]
    assert ModelConfig.from_gguf({**GGUF, "tokenizer.ggml.eot_token_id": 0}).eos_token_ids == [1, 0]


@pytest.mark.parametrize(
    "key",
    [k for k in GGUF if k.startswith("llama") and not k.endswith("_kv")] + ["general.architecture"],
)
def test_missing_gguf_key_is_named(key: str) -> None:
    keys = {name: value for name, value in GGUF.items() if name != key}
    with pytest.raises(ModelLoadError, match=f"key '{key}' is missing"):
        ModelConfig.from_gguf(keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; supported are llama"),
        ({"llama.expert_count": 8}, "experts"),
        ({"llama.rope.dimension_count": 8}, r"dimension_count: got 8, expected the whole head \(16\)"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.attention.head_count": [4, 4]}, "head_count"),
    ],
)
def test_gguf_that_is_not_supported(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        ModelConfig.from_gguf({**GGUF, **keys})


def test_gguf_rope_scaling() -> None:
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert ModelConfig.from_gguf({**GGUF, **linear}).rope_scaling == {"rope_type": "linear", "factor": 4.0}
    assert ModelConfig.from_gguf({**GGUF, "llama.rope.scale_linear": 4.0}).rope_scaling == {
        "rope_type": "linear",
        "factor": 4.0,
    }


def test_llama3_scaling_is_recovered_from_the_frequencies() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    hf = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, rope_parameters={**scaling, "rope_theta": 5e5}
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](hf, "cpu")
    plain = 5e5 ** (-2.0 * scaled.new_tensor(range(32)) / 64)
    factors = (plain / scaled).tolist()
    keys = {**GGUF, "llama.rope.freq_base": 5e5}
    assert ModelConfig.from_gguf(keys, rope_factors=factors).rope_scaling == pytest.approx(scaling)
    with pytest.raises(ModelLoadError, match=r"rope_freqs\.weight\[31\]"):
        ModelConfig.from_gguf(keys, rope_factors=[*factors[:-1], 3.0])
