"""The attention kernels and the backend made of them against the plain formula."""

import msgspec
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need triton, which is not installed here")

from lightllm.attention import flashinfer_kernels
from lightllm.attention.base import AttentionBackend, AttentionLayer
from lightllm.attention.flashinfer_prefill import LONG_QUERY_LEN
from lightllm.attention.registry import CUDA_BACKENDS, ORACLE, load_backend, select_cuda_backend
from lightllm.attention.self_check import START_CASE, Case, compare, compute, long_case, make_problem
from lightllm.attention.triton_gqa import TritonAttention, num_decode_splits
from lightllm.errors import ConfigError
from lightllm.kernels import ref
from lightllm.kernels.decode_attention import decode_attention
from lightllm.kernels.kv_write import kv_write
from lightllm.kernels.prefill_attention import prefill_attention
from lightllm.model_config import ModelConfig
from tests.attention.test_conformance import CASES, config

GPU = pytest.mark.gpu
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=GPU)]
# num_q_heads, num_kv_heads, head_dim
HEADS = [(6, 2, 64), (4, 4, 16), (8, 1, 24)]
REAL_HEADS = [pytest.param(h, marks=GPU) for h in ((32, 32, 128), (28, 4, 128), (8, 2, 80))]
# The interpreter is slow: it runs the cases that differ for these kernels.
BATCHES = [
    pytest.param(case, id=name, marks=() if name in ("shared prefix", "mixed") else GPU)
    for name, case in CASES.items()
]
MASKS = {"plain": {}, "window": {"window": 20}, "softcap": {"softcap": 3.0}}


@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("heads", [HEADS[1], *REAL_HEADS])
def test_backends_agree_with_oracle(
    heads: tuple[int, int, int], case: object, dtype: torch.dtype, name: str, device: torch.device
) -> None:
    model = config(*heads)
    backend = load_or_skip(name, model, dtype, device)
    assert compare(backend, load_backend(ORACLE), case, model, dtype, device=device) is None


def load_or_skip(name: str, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    if name == "flashinfer":
        if device.type != "cuda":
            pytest.skip("flashinfer needs a GPU")
        # Not compiled here: that takes longer than a test may.
        problem = flashinfer_kernels.load_kernels(model, dtype, device, may_compile=False)
        if problem is not None:
            pytest.skip(problem)
    return load_backend(name, config=model)


def scattered(seq_lens: tuple[int, ...], query_lens: tuple[int, ...]) -> Case:
    order = torch.randperm(sum(seq_lens), generator=torch.Generator().manual_seed(5)) + 1
    return Case(seq_lens, query_lens, tuple(order.tolist()))


LONG_CASES = {
    "at the limit": scattered((300, 256), (255, 256)),
    "self-check": long_case(LONG_QUERY_LEN),
    "chunk behind 3,000 scattered": scattered((3400,), (400,)),
    "several behind decodes": scattered((900, 17, 1300, 700, 600), (1, 1, 1, 700, 257)),
    "short ones before, between and behind": scattered((50, 300, 40, 290, 9), (20, 300, 3, 260, 9)),
    "a decode between": scattered((300, 500, 290), (300, 1, 260)),
}
LONG_HEADS = [(28, 4, 128), (32, 32, 128), (14, 2, 64)]
LONG_LAYERS = {
    "window 1": AttentionLayer(0, 0.1, window=1),
    "window 200": AttentionLayer(0, 0.1, window=200),
    "softcap": AttentionLayer(0, 0.2, softcap=1.5),
    "all": AttentionLayer(0, 0.2, window=65, softcap=1.5),
}


def model_of(heads: tuple[int, int, int], layer: AttentionLayer) -> ModelConfig:
    """A model that has layers of this kind, and others."""
    kinds = None if layer.window is None else ["full_attention", "sliding_attention"]
    return msgspec.structs.replace(
        config(*heads),
        sliding_window=layer.window,
        layer_types=kinds,
        attn_logit_softcapping=layer.softcap,
    )


@GPU
@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("case", LONG_CASES.values(), ids=LONG_CASES.keys())
@pytest.mark.parametrize("heads", LONG_HEADS)
def test_long_prompts(heads: tuple[int, int, int], case: Case, name: str, device: torch.device) -> None:
    model = config(*heads)
    backend = load_or_skip(name, model, torch.bfloat16, device)
    assert compare(backend, load_backend(ORACLE), case, model, torch.bfloat16, device=device) is None


@GPU
@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("case", ["self-check", "chunk behind 3,000 scattered"])
@pytest.mark.parametrize("layer", LONG_LAYERS.values(), ids=LONG_LAYERS.keys())
def test_long_prompts_in_every_kind_of_layer(
    layer: AttentionLayer, case: str, name: str, device: torch.device
) -> None:
    model = model_of((28, 4, 128), layer)
    backend = load_or_skip(name, model, torch.bfloat16, device)
    problem = compare(
        backend, load_backend(ORACLE), LONG_CASES[case], model, torch.bfloat16, layer=layer, device=device
    )
    assert problem is None


@GPU
@torch.inference_mode()
def test_layers_of_two_kinds_in_one_step(device: torch.device) -> None:
    layers = (AttentionLayer(0, 0.1), AttentionLayer(0, 0.1, window=200))
    model = model_of((28, 4, 128), layers[1])
    backend = load_or_skip("flashinfer", model, torch.bfloat16, device)
    case = LONG_CASES["several behind decodes"]
    expected = [compute(backend, case, model, torch.bfloat16, layer=x, device=device).out for x in layers]
    problem = make_problem(case, model, torch.bfloat16, device)
    problem.run(backend, layers[0])  # also plans
    for layer, out in zip((*layers, *layers), expected * 2, strict=True):
        assert torch.equal(backend.forward(problem.q, problem.k, problem.v, layer, problem.batch).cpu(), out)


@GPU
def test_queued_steps_keep_their_plans_and_wait_for_none(device: torch.device) -> None:
    model = config(28, 4, 128)
    backend = load_or_skip("flashinfer", model, torch.bfloat16, device)
    layer = AttentionLayer(0, 0.1)
    cases = [case for name, case in LONG_CASES.items() if name != "chunk behind 3,000 scattered"]
    expected = [compute(backend, case, model, torch.bfloat16, layer=layer, device=device) for case in cases]
    problems = [make_problem(case, model, torch.bfloat16, device) for case in cases]
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)  # a quarter of a second: the steps below wait behind it
    awake = torch.cuda.Event()
    awake.record()
    outs = []
    for i, problem in enumerate(problems):
        outs.append(problem.run(backend, layer))
        if i < 2:  # the third one waits for the copy of the first one's plan
            assert not awake.query()
    for out, outcome in zip(outs, expected, strict=True):
        assert torch.equal(out.cpu(), outcome.out)


def test_auto_says_why_it_does_not_take_flashinfer(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(flashinfer_kernels, "compute_capability", lambda device: (8, 0))
    backend, reason = select_cuda_backend("auto", config(*HEADS[1]), torch.float32, device)
    assert backend.name == "triton"
    assert reason == (
        "flashinfer: its kernels are for compute capability 9.0, this card has 8.0; "
        "agrees with torch_ref on random data"
    )
    with pytest.raises(ConfigError, match=r"this card has 8\.0; use --attention_backend triton"):
        select_cuda_backend("flashinfer", config(*HEADS[1]), torch.float32, device)


@GPU
def test_auto_takes_flashinfer_where_it_is_compiled(device: torch.device) -> None:
    model = config(28, 4, 128)
    load_or_skip("flashinfer", model, torch.bfloat16, device)
    backend, reason = select_cuda_backend("auto", model, torch.bfloat16, device)
    assert (backend.name, reason) == ("flashinfer", "agrees with torch_ref on random data")


@pytest.mark.parametrize("heads", [HEADS[2]])
def test_backend_agrees_on_other_heads(heads: tuple[int, int, int], device: torch.device) -> None:
    model = config(*heads)
    backend = TritonAttention.for_model(model)
    assert compare(backend, load_backend(ORACLE), START_CASE, model, torch.float32, device=device) is None


def pool(num_slots: int, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
    generator = torch.Generator().manual_seed(4)
    shape = (num_slots, heads[1], heads[2])
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(2)]


def table_of(seq_lens: list[int]) -> Tensor:
    """Scattered slots from 1 on, one row per sequence, and 0 behind its end."""
    order = torch.randperm(sum(seq_lens), generator=torch.Generator().manual_seed(1)).int() + 1
    rows = torch.zeros(len(seq_lens), max(seq_lens) + 3, dtype=torch.int32)
    for row, part in zip(rows, order.split(seq_lens), strict=True):
        row[: len(part)] = part
    return rows


def check(got: Tensor, expected: Tensor) -> None:
    tolerance = 1e-4 if got.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("num_splits", [1, 3, 8])
@pytest.mark.parametrize("heads", [HEADS[0], HEADS[2], *REAL_HEADS])
def test_decode(heads, num_splits: int, mask: dict, dtype: torch.dtype, device: torch.device) -> None:
    seq_lens = [1, 64, 65, 200, 17]
    k, v = pool(sum(seq_lens) + 1, heads, dtype, device)
    table = table_of(seq_lens)
    q = torch.randn(7, heads[0], heads[2], generator=torch.Generator().manual_seed(2)).to(dtype).to(device)
    tokens = torch.tensor([6, 1, 2, 0, 3], dtype=torch.int32)
    out = torch.full((7, heads[0] * heads[2]), 7.0, dtype=dtype, device=device)
    scratch = torch.full((5 * heads[0] * num_splits, heads[2] + 1), torch.nan, device=device).flatten()
    size = 5 * heads[0] * num_splits * heads[2]
    decode_attention(
        q,
        k,
        v,
        table.to(device),
        tokens.to(device),
        torch.arange(5, dtype=torch.int32, device=device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        out,
        scale=0.3,
        window=mask.get("window"),
        softcap=mask.get("softcap"),
        num_splits=num_splits,
        partial=scratch[:size],
        logsumexp=scratch[size:],
    )
    for row, (token, seq_len) in enumerate(zip(tokens.tolist(), seq_lens, strict=True)):
        slots = table[row, :seq_len].to(device)
        check(out[token], ref.paged_attention(q[token : token + 1], k, v, slots, scale=0.3, **mask)[0])
    assert (out[4:6] == 7.0).all()  # tokens of nobody


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("block_m", [16, pytest.param(64, marks=GPU), pytest.param(128, marks=GPU)])
@pytest.mark.parametrize("heads", [HEADS[0], HEADS[2], *REAL_HEADS])
def test_prefill(heads, block_m: int, mask: dict, dtype: torch.dtype, device: torch.device) -> None:
    seq_len, tile_tokens = 150, block_m // (heads[0] // heads[1])
    k, v = pool(seq_len + 1, heads, dtype, device)
    table = table_of([seq_len])
    # The last 70 tokens in tiles, in reverse order, behind one token that is not ours.
    starts = list(range(80, seq_len, tile_tokens))[::-1]
    tiles = [[0, 1 + start - 80, min(tile_tokens, seq_len - start), start] for start in starts]
    q = torch.randn(71, heads[0], heads[2], generator=torch.Generator().manual_seed(3)).to(dtype).to(device)
    out = torch.full((71, heads[0] * heads[2]), 7.0, dtype=dtype, device=device)
    prefill_attention(
        q,
        k,
        v,
        table.to(device),
        torch.tensor(tiles, dtype=torch.int32, device=device),
        out,
        scale=0.3,
        window=mask.get("window"),
        softcap=mask.get("softcap"),
        block_m=block_m,
    )
    slots = table[0, :seq_len].to(device)
    check(out[1:], ref.paged_attention(q[1:], k, v, slots, scale=0.3, **mask))
    assert (out[0] == 7.0).all()


def test_kv_write(device: torch.device) -> None:
    qkv = torch.randn(4, 5, 24, device=device)
    k, v = qkv[:, 1:3], qkv[:, 3:]
    pool_k, pool_v = torch.zeros(2, 9, 2, 24, device=device)
    slots = torch.tensor([8, 1, 0, 5], device=device)
    kv_write(k, k, v, pool_k, pool_v, slots, None)
    assert torch.equal(pool_k[slots], k)
    assert torch.equal(pool_v[slots], v)
    assert (pool_k[[2, 3, 4, 6, 7]] == 0).all()


@pytest.mark.parametrize(("num_q_heads", "head_dim", "rotary_dim"), [(9, 24, 24), (2, 64, 64), (3, 96, 48)])
def test_kv_write_rotates(num_q_heads: int, head_dim: int, rotary_dim: int, device: torch.device) -> None:
    qkv = torch.randn(4, num_q_heads + 4, head_dim, device=device)
    angles = torch.randn(4, rotary_dim // 2, device=device) * 50
    q, k, v = qkv.split([num_q_heads, 2, 2], 1)
    expected = qkv[:, : num_q_heads + 2].clone()
    ref.rotate_(expected, angles.cos(), angles.sin())
    pool_k, pool_v = torch.zeros(2, 9, 2, head_dim, device=device)
    slots = torch.tensor([8, 1, 0, 5], device=device)
    kv_write(q, k, v, pool_k, pool_v, slots, (angles.cos(), angles.sin()))
    check(q, expected[:, :num_q_heads])
    check(pool_k[slots], expected[:, num_q_heads:])
    assert torch.equal(pool_v[slots], v)
    assert (pool_k[[2, 3, 4, 6, 7]] == 0).all()


def test_splits_fill_the_device_and_no_more() -> None:
    assert num_decode_splits(32 * 64) == 1
    assert num_decode_splits(32) == 17
    assert num_decode_splits(1) == 64
