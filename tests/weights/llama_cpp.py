"""GGUF files of tiny HF models, written with the `gguf` package the way llama.cpp's converter does.

Names come from that package's own table; what the converter does to weights is done here once more, in the
opposite direction to the code under test.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor

# Three query heads share a KV head.
DIMENSIONS = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 133,
    "max_position_embeddings": 512,
}


def tiny_hf(architecture: str, **overrides: Any) -> transformers.PreTrainedModel:
    """A random model whose tensors all differ, norms and biases included."""
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**copy.deepcopy({**DIMENSIONS, **overrides})))
    for parameter in model.parameters():
        parameter.data.uniform_(-1.0, 1.0)
    return model


def permute(rows: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from halves to pairs."""
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def converted(arch: str, state: dict[str, Tensor], hf: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """HF name and what the converter stores, for each tensor."""
    heads = {"q_proj": hf["num_attention_heads"], "k_proj": hf["num_key_value_heads"]}
    for name, tensor in state.items():
        module = name.split(".")[-2]
        if arch == "llama" and module in heads:
            yield name, permute(tensor, heads[module])
        elif arch == "internlm2" and module == "wqkv":
            groups = tensor.view(heads["k_proj"], -1, hf["head_dim"], tensor.shape[1])
            q, k, v = groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)
            layer = name.removesuffix("attention.wqkv.weight")
            yield f"{layer}self_attn.q_proj.weight", permute(q, heads["q_proj"])
            yield f"{layer}self_attn.k_proj.weight", permute(k, heads["k_proj"])
            yield f"{layer}self_attn.v_proj.weight", v
        elif arch.startswith("gemma") and name.endswith("norm.weight"):
            yield name, tensor + 1
        else:
            yield name, tensor


def write_model(path: Path, arch: str, state: dict[str, Tensor], hf: dict[str, Any]) -> Path:
    """Write a model.

    Args:
        arch: as in general.architecture.
        state: HF name -> tensor.
        hf: its config.json, as transformers writes it.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_token_list([f"t{i}" for i in range(hf["vocab_size"])])
    writer.add_eos_token_id(2)
    add_dimensions(writer, arch, hf)
    add_rope(writer, arch, hf)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, hf["num_hidden_layers"])
    for name, tensor in converted(arch, state, hf):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, f"the gguf package has no name for {name}"
        writer.add_tensor(stored, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_dimensions(writer: gguf.GGUFWriter, arch: str, hf: dict[str, Any]) -> None:
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    if arch not in ("phi3", "internlm2"):  # these have no head size of their own
        writer.add_key_length(hf["head_dim"])
        writer.add_value_length(hf["head_dim"])
    if arch == "phi3":
        writer.add_sliding_window(hf["sliding_window"] or 0)
    elif arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(hf["sliding_window"])
    if hf.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
    if hf.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(hf["final_logit_softcapping"])


def add_rope(writer: gguf.GGUFWriter, arch: str, hf: dict[str, Any]) -> None:
    rope = hf["rope_parameters"].get("full_attention", hf["rope_parameters"])
    if arch != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if arch in ("llama", "phi3", "glm4"):
        writer.add_rope_dimension_count(int(hf["head_dim"] * rope.get("partial_rotary_factor", 1.0)))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, hf["head_dim"]))
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        ratio = hf["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(ratio) / math.log(original)))
        for length in ("long", "short"):
            divisors = np.array(rope[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", divisors)


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).double() / head_dim)
    turns = frequencies * rope["original_max_position_embeddings"] / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / rope["factor"] + kept)).float().numpy()
