"""ModelConfig from GGUF metadata, and what is refused."""

from typing import Any

import pytest
import transformers

from lightllm.errors import ModelLoadError
from lightllm.weights.gguf_config import gguf_model_config

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


def test_gguf_metadata() -> None:
    config = gguf_model_config(GGUF)
    assert (config.architecture, config.dtype) == ("LlamaForCausalLM", "float32")
    assert (config.vocab_size, config.head_dim, config.num_key_value_heads) == (3, 16, 2)
    assert config.tie_word_embeddings
    assert not gguf_model_config(GGUF, tensors=["output.weight"]).tie_word_embeddings


def test_gguf_end_of_turn_tokens_are_end_tokens() -> None:
    assert gguf_model_config(GGUF).eos_token_ids == [1]
    template = {"tokenizer.chat_template": "{{ x }}<|im_end|>"}
    assert gguf_model_config({**GGUF, **template}).eos_token_ids == [1, 2]
    assert gguf_model_config({**GGUF, "tokenizer.ggml.eot_token_id": 0}).eos_token_ids == [1, 0]


@pytest.mark.parametrize(
    "key",
    [k for k in GGUF if k.startswith("llama") and not k.endswith("_kv")] + ["general.architecture"],
)
def test_missing_gguf_key_is_named(key: str) -> None:
    keys = {name: value for name, value in GGUF.items() if name != key}
    with pytest.raises(ModelLoadError, match=f"key '{key}' is missing"):
        gguf_model_config(keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"general.architecture": "mamba"},
            "architecture 'mamba' is not supported; supported are gemma2, gemma3",
        ),
        ({"llama.expert_count": 8}, "experts"),
        ({"llama.rope.dimension_count": 8}, r"dimension_count: got 8, expected the whole head \(16\)"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.attention.head_count": [4, 4]}, "head_count"),
    ],
)
def test_gguf_that_is_not_supported(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        gguf_model_config({**GGUF, **keys})


def test_gguf_rope_scaling() -> None:
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert gguf_model_config({**GGUF, **linear}).rope_scaling == {"rope_type": "linear", "factor": 4.0}
    assert gguf_model_config({**GGUF, "llama.rope.scale_linear": 4.0}).rope_scaling == {
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
    assert gguf_model_config(keys, rope_factors={"rope_freqs.weight": factors}).rope_scaling == pytest.approx(
        scaling
    )
    with pytest.raises(ModelLoadError, match=r"rope_freqs\.weight\[31\]"):
        gguf_model_config(keys, rope_factors={"rope_freqs.weight": [*factors[:-1], 3.0]})


GEMMA3 = {
    **{key.replace("llama", "gemma3"): value for key, value in GGUF.items()},
    "general.architecture": "gemma3",
    "gemma3.attention.sliding_window": 512,
}


def test_windows_by_the_family_s_pattern_or_a_stated_one() -> None:
    def windows(**changes: Any) -> list[int | None]:
        keys = {**GEMMA3, "gemma3.block_count": 6, **{f"gemma3.{k}": v for k, v in changes.items()}}
        config = gguf_model_config(keys)
        return [config.window(i) for i in range(6)]

    assert windows() == [512] * 5 + [None]
    pattern = "attention.sliding_window_pattern"
    assert windows(**{pattern: 3}) == [512, 512, None] * 2
    assert windows(**{pattern: [True, False] * 3}) == [512, None] * 3
    assert windows(**{"attention.sliding_window": 0}) == [None] * 6
    assert windows(**{pattern: [True] * 6}) == [512] * 6
    with pytest.raises(ModelLoadError, match="one entry for each of 6 layers"):
        windows(**{pattern: [True]})


def test_the_scale_of_scores_is_stated_or_known_by_size() -> None:
    sized = {**GEMMA3, "gemma3.attention.key_length": 32}
    assert gguf_model_config(sized).attention_scale == pytest.approx(32**-0.5)
    assert gguf_model_config({**sized, "gemma3.block_count": 62}).attention_scale == pytest.approx(16**-0.5)
    stated = gguf_model_config({**sized, "gemma3.attention.scale": 0.25})
    assert stated.attention_scale == pytest.approx(0.25)


def test_local_rotary_base() -> None:
    assert gguf_model_config(GEMMA3).rope_local_base_freq == 1e4
    assert gguf_model_config({**GEMMA3, "gemma3.rope.freq_base_swa": 5e3}).rope_local_base_freq == 5e3


def test_vocabulary_size_is_the_number_of_tokens() -> None:
    assert gguf_model_config({**GGUF, "llama.vocab_size": 99}).vocab_size == 3
    without = {key: value for key, value in GGUF.items() if key != "tokenizer.ggml.tokens"}
    assert gguf_model_config({**without, "llama.vocab_size": 99}).vocab_size == 99
