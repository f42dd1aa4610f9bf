"""Every GGUF architecture there and back: a tiny HF model, converted as llama.cpp does, read by us."""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
import transformers
from torch import Tensor

from lightllm.model_config import ModelConfig
from lightllm.server.model_files import ModelFiles, describe_files
from lightllm.weights.gguf import GGUFReader
from lightllm.weights.gguf_source import GGUFSource
from tests.weights.llama_cpp import tiny_hf, write_model

# What the file does not say, or says otherwise.
NOT_COMPARED = {"dtype": "float32", "bos_token_id": None, "eos_token_ids": [2]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 16.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "long_factor": [1.5 + i for i in range(6)],
    "short_factor": [1.0 + i / 8 for i in range(6)],
    "original_max_position_embeddings": 256,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


class Case(NamedTuple):
    gguf: str
    hf: str
    overrides: dict[str, Any] = {}


CASES = [
    Case("llama", "LlamaForCausalLM"),
    Case("llama", "LlamaForCausalLM", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    Case("llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    Case("llama", "MistralForCausalLM", {"sliding_window": None}),
    Case("qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    Case("qwen3", "Qwen3ForCausalLM", {"rope_parameters": YARN, "head_dim": 32}),
    Case("gemma2", "Gemma2ForCausalLM", {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    Case("gemma3", "Gemma3ForCausalLM", {"query_pre_attn_scalar": 16, "num_hidden_layers": 7}),
    Case(
        "gemma3",
        "Gemma3ForCausalLM",
        {"query_pre_attn_scalar": 16, "rope_parameters": GEMMA3_ROPE, "num_hidden_layers": 6},
    ),
    Case("phi3", "Phi3ForCausalLM", {"sliding_window": 7, "pad_token_id": 0}),
    Case(
        "phi3",
        "Phi3ForCausalLM",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256, "pad_token_id": 0},
    ),
    Case("glm4", "Glm4ForCausalLM", {"attention_bias": True, "pad_token_id": 0}),
    Case("glm4", "Glm4ForCausalLM", {"attention_bias": False, "pad_token_id": 0}),
]


def config_of(oracle: transformers.PreTrainedModel) -> ModelConfig:
    return ModelConfig.from_hf({**oracle.config.to_dict(), "architectures": [type(oracle).__name__]})


def expected_config(config: ModelConfig, gguf_arch: str) -> ModelConfig:
    changes: dict[str, Any] = dict(NOT_COMPARED)
    if gguf_arch == "llama":
        changes["architecture"] = "LlamaForCausalLM"
    if config.architecture == "Qwen2ForCausalLM":
        changes["attention_bias"] = True  # there whatever HF's config says
    if config.query_pre_attn_scalar == config.head_dim:
        changes["query_pre_attn_scalar"] = None  # the same thing
    return msgspec.structs.replace(config, **changes)


def check_tensors(source: GGUFSource, state: dict[str, Tensor]) -> None:
    assert sorted(source.names()) == sorted(state)
    for name, tensor in state.items():
        assert source.shape(name) == tuple(tensor.shape)
        loaded = source.load(name)
        assert isinstance(loaded, Tensor)
        if source.reader.metadata["general.architecture"].startswith("gemma") and "norm" in name:
            torch.testing.assert_close(loaded, tensor, rtol=0, atol=1e-6)
        else:
            assert torch.equal(loaded, tensor), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case.gguf, case.hf, *case.overrides]))
def test_config_and_tensors_come_back(case: Case, tmp_path: Path) -> None:
    oracle = tiny_hf(case.hf, **case.overrides)
    state = dict(oracle.state_dict())
    if oracle.config.tie_word_embeddings:
        del state["lm_head.weight"]
    path = write_model(tmp_path / "m.gguf", case.gguf, state, oracle.config.to_dict())
    config = describe_files(ModelFiles(kind="gguf", path=path, name="m")).config
    expected = msgspec.structs.asdict(expected_config(config_of(oracle), case.gguf))
    scaling, expected_scaling = config.rope_scaling or {}, expected["rope_scaling"] or {}
    attention_factor = scaling.pop("attention_factor", None)  # HF computes it where it is not stated
    if attention_factor is not None:
        assert attention_factor == pytest.approx(oracle.model.rotary_emb.attention_scaling, rel=1e-5)
    assert scaling == {**expected_scaling, **{k: pytest.approx(v) for k, v in numbers(expected_scaling)}}
    got = {**msgspec.structs.asdict(config), "rope_scaling": expected["rope_scaling"]}
    assert got == {**expected, "rms_norm_eps": pytest.approx(expected["rms_norm_eps"])}
    check_tensors(GGUFSource(GGUFReader(path)), state)


def numbers(scaling: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in scaling.items() if not isinstance(value, str)]


def internlm2_state(state: dict[str, Tensor], hf: dict[str, Any]) -> dict[str, Tensor]:
    """Llama's tensors under InternLM2's names, with q, k and v of each KV head one below the other."""
    renamed = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        **{f"mlp.{part}_proj": f"feed_forward.w{n}" for part, n in (("gate", 1), ("up", 3), ("down", 2))},
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, part = name.partition("self_attn.")
        if part == "q_proj.weight":
            shape = (hf["num_key_value_heads"], -1, hf["head_dim"], hf["hidden_size"])
            rows = [state[f"{layer}self_attn.{p}_proj.weight"].view(shape) for p in "qkv"]
            found[f"{layer}attention.wqkv.weight"] = torch.cat(rows, 1).view(-1, hf["hidden_size"])
        elif part not in ("k_proj.weight", "v_proj.weight"):
            old = next((old for old in renamed if old in name), "")
            found[name.replace(old, renamed.get(old, ""))] = tensor
    return found


def test_internlm2_comes_apart_into_llama(tmp_path: Path) -> None:
    oracle = tiny_hf("LlamaForCausalLM")
    state, hf = dict(oracle.state_dict()), oracle.config.to_dict()
    path = write_model(tmp_path / "m.gguf", "internlm2", internlm2_state(state, hf), hf)
    config = describe_files(ModelFiles(kind="gguf", path=path, name="m")).config
    assert config == msgspec.structs.replace(
        config_of(oracle), **NOT_COMPARED, rms_norm_eps=config.rms_norm_eps
    )
    check_tensors(GGUFSource(GGUFReader(path)), state)
