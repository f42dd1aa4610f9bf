"""The oracle itself, against torch's own attention on sequences that need no pool."""

import math

import torch
from torch.nn import functional

from lightllm.attention.base import AttentionLayer
from lightllm.attention.self_check import Case, compute
from lightllm.attention.torch_ref import TorchRefAttention
from lightllm.model_config import ModelConfig

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=8,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
)


def attend(
    case: Case, layer: AttentionLayer | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outcome = compute(TorchRefAttention(), case, CONFIG, torch.float32, layer=layer)
    slots = torch.tensor(case.slots)
    return outcome.out, outcome.k[slots], outcome.v[slots]


def queries(case: Case) -> torch.Tensor:
    """The queries that `compute` makes: they follow the pool's values in the same generator."""
    generator = torch.Generator().manual_seed(len(case.slots))
    for _ in range(2):
        torch.empty(max(case.slots) + 1, 2, 16).normal_(generator=generator)
    return torch.empty(sum(case.query_lens), 8, 16).normal_(generator=generator)[:, :4]


def test_whole_prompt() -> None:
    case = Case((9,), (9,), tuple(range(20, 2, -2)))
    out, k, v = attend(case)
    expected = functional.scaled_dot_product_attention(
        queries(case).transpose(0, 1),
        k.transpose(0, 1),
        v.transpose(0, 1),
        is_causal=True,
        enable_gqa=True,
    )
    torch.testing.assert_close(out, expected.transpose(0, 1).flatten(1))


def test_each_sequence_sees_itself_only() -> None:
    case = Case((5, 7), (1, 1), (3, 1, 9, 7, 4, 2, 5, 6, 8, 10, 12, 11))
    out, k, v = attend(case)
    q = queries(case)
    for i, part in enumerate((slice(0, 5), slice(5, 12))):
        expected = functional.scaled_dot_product_attention(
            q[i, :, None], k[part].transpose(0, 1), v[part].transpose(0, 1), enable_gqa=True
        )
        torch.testing.assert_close(out[i], expected.flatten())


def test_window_and_scale() -> None:
    case = Case((9,), (9,), tuple(range(1, 10)))
    out, k, v = attend(case, AttentionLayer(0, 0.4, window=3))
    is_seen = torch.tensor([[0 <= i - j < 3 for j in range(9)] for i in range(9)])
    expected = functional.scaled_dot_product_attention(
        queries(case).transpose(0, 1),
        k.transpose(0, 1),
        v.transpose(0, 1),
        attn_mask=is_seen,
        scale=0.4,
        enable_gqa=True,
    )
    torch.testing.assert_close(out, expected.transpose(0, 1).flatten(1))


def test_softcap() -> None:
    case = Case((2,), (1,), (1, 2))
    out, k, v = attend(case, AttentionLayer(0, 0.5, softcap=0.6))
    for head, q in enumerate(queries(case)[0]):
        first, last = (0.6 * math.tanh(float(q @ k[i, head // 2]) * 0.5 / 0.6) for i in range(2))
        share = 1 / (1 + math.exp(first - last))  # of the last token
        expected = (1 - share) * v[0, head // 2] + share * v[1, head // 2]
        torch.testing.assert_close(out[0].view(4, 16)[head], expected)
