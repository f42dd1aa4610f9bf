"""The memory ledger: what goes where on the worker's device, by arithmetic before anything is allocated.

Knows flags, dimensions and bytes; allocates nothing. Runs in the worker.
"""

from dataclasses import dataclass

import torch

from lightllm.config import Config
from lightllm.device.base import Device
from lightllm.device.kv_pool import kv_bytes_per_token
from lightllm.errors import ModelLoadError
from lightllm.model_config import ModelConfig

MIB = 1024**2
CPU_WORKSPACE_BYTES = 64 * MIB
# On a CPU unused slots cost nothing, but more than this is of no use to a few cores.
CPU_KV_BYTES = 2 * 1024**3
# What a GPU needs beside tensors of ours: the libraries' workspaces and fragmentation.
CUDA_LIBRARY_BYTES = 512 * MIB
# Of a device that others use too, left to the driver.
CUDA_CONTEXT_BYTES = 256 * MIB
# Measured on an H100, 32 layers: a captured graph takes 3 to 6 MiB of the driver's memory.
GRAPH_BYTES_PER_LAYER = 192 * 1024
# Steps with prompts of up to so many tokens get a graph, by multiples of the first number. With more of them
# the GPU takes longer than Python needs to launch its kernels.
PROMPT_GRAPH_STEP, PROMPT_GRAPH_TOKENS = 64, 512


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """Where the memory goes, in bytes.

    Attributes:
        total, free: of the device; free before anything was loaded.
        weights: of the model.
        tables: token ids and slots of all rows.
        workspace: activations of the largest step, and what libraries take.
        logits: of the largest step that samples, with what sampling makes of them.
        graphs: all graphs, with the memory that those of prompts compute in.
        kv_budget: left for KV.
        kv: taken for it.
    """

    total: int
    free: int
    weights: int
    tables: int
    workspace: int
    logits: int
    graphs: int
    kv_budget: int
    kv: int = 0

    def __str__(self) -> str:
        parts = [("weights", self.weights), ("KV", self.kv), ("row tables", self.tables)]
        parts += [("workspace", self.workspace), ("largest logits", self.logits), ("graphs", self.graphs)]
        parts += [("free before loading", self.free), ("device", self.total)]
        return ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in parts)


def plan_memory(
    config: Config, model: ModelConfig, dtype: torch.dtype, device: Device, free: int, weights: int
) -> MemoryLedger:
    """Fill in everything but the KV itself.

    Args:
        free: bytes free before the weights were loaded.
        weights: bytes they took.
    """
    engine = config.engine
    total = device.total_memory_bytes()
    tables = 2 * 4 * engine.running_max_req_size * (engine.max_req_total_len + 1)
    logits = engine.running_max_req_size * model.vocab_size * 4
    if device.name == "cpu":
        budget = min(CPU_KV_BYTES, int((free - weights - CPU_WORKSPACE_BYTES) * 0.5 * engine.mem_fraction))
        return MemoryLedger(total, free, weights, tables, CPU_WORKSPACE_BYTES, logits, 0, budget)
    # The model's own dtype, float32, and a copy for graphs or for what the processors change.
    logits = min(engine.running_max_req_size, engine.batch_max_tokens) * model.vocab_size * 10
    workspace = CUDA_LIBRARY_BYTES + engine.batch_max_tokens * _activation_bytes(model, dtype)
    prompt_sizes = prompt_graph_sizes(config, engine.max_req_total_len)
    num_graphs = num_graph_sizes(config) + len(prompt_sizes)
    graphs = num_graphs * model.num_hidden_layers * GRAPH_BYTES_PER_LAYER
    graphs += max(prompt_sizes, default=0) * _activation_bytes(model, dtype)
    # The fraction is of the whole device; what others hold of the rest of it is not counted twice.
    share = min(int(total * engine.mem_fraction), free - CUDA_CONTEXT_BYTES)
    budget = share - weights - tables - workspace - logits - graphs
    return MemoryLedger(total, free, weights, tables, workspace, logits, graphs, budget)


def num_kv_slots(config: Config, model: ModelConfig, dtype: torch.dtype, ledger: MemoryLedger) -> int:
    """KV capacity in tokens: as asked, or what the budget holds.

    Raises:
        ModelLoadError: what was asked does not fit; the message has the numbers and the flag to change.
    """
    per_token = kv_bytes_per_token(model, dtype)
    fits = max(0, ledger.kv_budget) // per_token
    asked = config.engine.max_total_token_num
    if asked is not None and asked > _limit_asked(config, ledger, fits, per_token):
        raise ModelLoadError(
            f"--max_total_token_num {asked} needs {asked * per_token / MIB:.0f} MiB of KV ({per_token} bytes "
            f"a token); {fits} tokens fit beside {ledger}; lower it, or raise --mem_fraction "
            f"{config.engine.mem_fraction:g}"
        )
    if asked is not None:
        return asked
    if fits < 2:
        raise ModelLoadError(
            f"{max(ledger.kv_budget, 0) / MIB:.0f} MiB are left for KV beside {ledger}, and one token needs "
            f"{per_token} bytes; free memory, lower --batch_max_tokens {config.engine.batch_max_tokens} or "
            f"--running_max_req_size {config.engine.running_max_req_size}, raise --mem_fraction "
            f"{config.engine.mem_fraction:g}, or choose a smaller model"
        )
    return fits


def _limit_asked(config: Config, ledger: MemoryLedger, fits: int, per_token: int) -> int:
    """On a CPU a user may ask for more than the default takes: up to the fraction of all that is free."""
    if ledger.graphs or config.engine.device == "cuda":
        return fits
    free = ledger.free - ledger.weights - ledger.workspace
    return max(0, int(free * config.engine.mem_fraction)) // per_token


def num_graph_sizes(config: Config) -> int:
    """How many batch sizes get a graph."""
    return 0 if config.graph.disable_cudagraph else len(graph_sizes(config))


def prompt_graph_sizes(config: Config, max_len: int) -> list[int]:
    """The numbers of tokens of steps with prompts that get a graph; none if rows are shorter than padding."""
    if config.graph.disable_cudagraph or max_len < PROMPT_GRAPH_STEP:
        return []
    return list(range(PROMPT_GRAPH_STEP, PROMPT_GRAPH_TOKENS + 1, PROMPT_GRAPH_STEP))


def graph_sizes(config: Config) -> list[int]:
    """The batch sizes that get a graph: every one up to the split, then in steps, up to the largest."""
    graph = config.graph
    largest = min(graph.graph_max_batch_size, config.engine.running_max_req_size)
    split = min(graph.graph_split_batch_size, largest)
    sizes = [
        *range(1, split + 1),
        *range(split + graph.graph_grow_step_size, largest, graph.graph_grow_step_size),
    ]
    return sizes if sizes[-1] == largest else [*sizes, largest]


def _activation_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token's activations take at the widest point of a layer, generously."""
    attention = 2 * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    mlp = 3 * model.intermediate_size
    return (6 * model.hidden_size + max(attention, mlp)) * dtype.itemsize
