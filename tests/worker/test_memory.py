"""The memory ledger: arithmetic, refusals with numbers, and which graphs there are."""

import msgspec
import pytest
import torch

from lightllm.config import Config, EngineSection, GraphSection
from lightllm.device.device import CpuDevice
from lightllm.device.kv_pool import kv_bytes_per_token
from lightllm.errors import ModelLoadError
from lightllm.model_config import ModelConfig
from lightllm.worker.memory import MIB, graph_sizes, num_kv_slots, plan_memory

GIB = 1024 * MIB
LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    vocab_size=32000,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)


class Gpu(CpuDevice):
    """80 GiB, as far as arithmetic can tell."""

    name = "cuda"

    def total_memory_bytes(self) -> int:
        return 80 * GIB


def config(**engine) -> Config:
    fields = {"device": "cuda", "batch_max_tokens": 8192, "max_req_total_len": 4096, **engine}
    return Config(engine=EngineSection(**fields))


def ledger_of(config: Config, free: int = 79 * GIB, weights: int = 13 * GIB):
    return plan_memory(config, LLAMA, torch.bfloat16, Gpu(), free, weights)


def test_the_parts_add_up_to_the_fraction_of_the_device():
    ledger = ledger_of(config())
    others = ledger.weights + ledger.tables + ledger.workspace + ledger.logits + ledger.graphs
    assert ledger.kv_budget + others == int(80 * GIB * 0.9)
    slots = num_kv_slots(config(), LLAMA, torch.bfloat16, ledger)
    assert slots == ledger.kv_budget // kv_bytes_per_token(LLAMA, torch.bfloat16)
    text = str(ledger)
    for part in ("weights 13312 MiB", "workspace", "largest logits", "graphs", "device 81920 MiB"):
        assert part in text


def test_a_device_that_others_use_too_is_shared():
    half = config(mem_fraction=0.4)
    alone, beside = ledger_of(half), ledger_of(half, free=40 * GIB)
    assert alone.kv_budget == beside.kv_budget  # it had 0.4 of the device either way
    squeezed = ledger_of(half, free=25 * GIB)
    assert squeezed.kv_budget < alone.kv_budget - 6 * GIB  # no more than there is


def test_without_graphs_there_is_more_room():
    without = msgspec.structs.replace(config(), graph=GraphSection(disable_cudagraph=True))
    assert ledger_of(without).graphs == 0
    assert ledger_of(without).kv_budget > ledger_of(config()).kv_budget


def test_what_was_asked_is_given_or_refused_with_numbers():
    asked = config(max_total_token_num=5000)
    assert num_kv_slots(asked, LLAMA, torch.bfloat16, ledger_of(asked)) == 5000
    asked = config(max_total_token_num=1_000_000)
    with pytest.raises(ModelLoadError) as caught:
        num_kv_slots(asked, LLAMA, torch.bfloat16, ledger_of(asked))
    for part in ("--max_total_token_num 1000000", "524288 bytes a token", "--mem_fraction 0.9", "MiB"):
        assert part in str(caught.value)


def test_a_model_that_leaves_no_room_is_refused_with_flags():
    with pytest.raises(ModelLoadError) as caught:
        num_kv_slots(config(), LLAMA, torch.bfloat16, ledger_of(config(), weights=75 * GIB))
    for part in ("--batch_max_tokens 8192", "--running_max_req_size 1000", "--mem_fraction 0.9", "76800 MiB"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "rows", "sizes"),
    [
        ({}, 1000, [*range(1, 33), *range(48, 257, 16)]),
        ({"graph_max_batch_size": 100}, 1000, [*range(1, 33), 48, 64, 80, 96, 100]),
        ({}, 20, list(range(1, 21))),
        (
            {"graph_max_batch_size": 8, "graph_split_batch_size": 4, "graph_grow_step_size": 2},
            50,
            [1, 2, 3, 4, 6, 8],
        ),
        ({"graph_max_batch_size": 1}, 50, [1]),
    ],
)
def test_graph_sizes(flags: dict, rows: int, sizes: list[int]):
    found = graph_sizes(
        msgspec.structs.replace(config(running_max_req_size=rows), graph=GraphSection(**flags))
    )
    assert found == sizes
