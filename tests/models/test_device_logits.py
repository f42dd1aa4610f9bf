"""Logits on the GPU against those of the CPU in float32, over whole prompts, chunks and decode."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU side needs triton, which is not installed here")

from lightllm.attention.registry import load_backend
from lightllm.device.base import make_device
from lightllm.device.kv_pool import KVPool
from lightllm.layers.ops import Ops
from lightllm.layers.triton_ops import TritonOps
from lightllm.messages import NewRequest, ScheduledBatch
from lightllm.model_config import ModelConfig
from lightllm.models import load_model, tensor_shapes
from lightllm.sampling_params import SamplingParams
from lightllm.weights.dummy import DummySource
from lightllm.worker.device_runner import NO_SLOTS
from lightllm.worker.device_tables import DeviceTables
from lightllm.worker.inputs import RowTables
from lightllm.worker.model_runner import forward

pytestmark = pytest.mark.gpu
SHAPES = {
    "tiny": (64, 128, 3, 6, 2, 16, 300),
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152),
    "llama-2-7b, 2 layers": (4096, 11008, 2, 32, 32, 128, 32000),
    "qwen2-7b, 2 layers": (3584, 18944, 2, 28, 4, 128, 32000),
}
# Relative error of the logits: rounding of the dtype, summed over the layers.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
LENGTHS = [70, 1, 33]


def config(shape: tuple[int, ...]) -> ModelConfig:
    hidden, inner, layers, heads, kv_heads, head_dim, vocab = shape
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def batches(vocab: int) -> list[ScheduledBatch]:
    """Three prompts: the first in two chunks, the others whole, then one decode of each."""
    params, ends = SamplingParams(), [sum(LENGTHS[: i + 1]) + i for i in range(3)]
    new = [
        NewRequest(
            request_id=str(row),
            row=row,
            token_ids=[(row * 1000 + 7919 * i) % vocab for i in range(length + 1)],
            num_prompt_tokens=length,
            sampling_params=params,
            eos_token_ids=[],
            seed=0,
        )
        for row, length in enumerate(LENGTHS)
    ]
    slots = [list(range(end - length + 1, end + 2)) for end, length in zip(ends, LENGTHS, strict=True)]
    first = ScheduledBatch(
        step_id=0,
        new_requests=new,
        rows=[0, 1, 2],
        starts=[0, 0, 0],
        num_new_tokens=[40, 1, 33],
        is_sampling=[False, True, True],
        slot_starts=[0, 0, 0],
        slot_counts=[len(part) for part in slots],
        slots=[slot for part in slots for slot in part],
    )
    second = ScheduledBatch(
        step_id=1, rows=[1, 0], starts=[1, 40], num_new_tokens=[1, 30], is_sampling=[True, True]
    )
    third = ScheduledBatch(
        step_id=2, rows=[2, 0], starts=[33, 70], num_new_tokens=[1, 1], is_sampling=[True, True]
    )
    return [first, second, third]


@torch.inference_mode()
def logits_of(config: ModelConfig, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Logits of all tokens of all batches, on the CPU."""
    device = make_device(name)
    is_gpu = name == "cuda"
    backend = load_backend("triton" if is_gpu else "torch_ref", config=config)
    model = load_model(
        config,
        DummySource(tensor_shapes(config), config.dtype, seed=1),
        dtype=dtype,
        device=device.torch_device,
        backend=backend,
        ops=TritonOps() if is_gpu else Ops(),
        num_threads=4,
        progress=lambda done, total: None,
    )
    pool = KVPool(config, 200, dtype, device.torch_device)
    tables = DeviceTables(4, 100, device) if is_gpu else RowTables(4, 100)
    found = []
    for batch in batches(config.vocab_size):
        tables.apply(batch)
        inputs = tables.inputs(batch)
        hidden = forward(model, backend, pool, inputs, NO_SLOTS if is_gpu else tables.slots)
        found.append(model.logits(hidden).cpu())
    return torch.cat(found)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_the_cpu(shape: tuple[int, ...]) -> None:
    model = config(shape)
    torch.set_num_threads(8)
    expected = logits_of(model, "cpu", torch.float32)
    torch.set_num_threads(1)
    for dtype, limit in LIMITS.items():
        got = logits_of(model, "cuda", dtype)
        error = ((got - expected).norm() / expected.norm()).item()
        print(f"{model.hidden_size} {dtype}: relative error {error:.2g}")
        assert error < limit, (dtype, error)
