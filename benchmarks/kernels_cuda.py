"""Kernels of the GPU side at real shapes: time, and what share of the card's measured ceilings that is.

    python benchmarks/kernels_cuda.py [--only prefill,suffix] [--out benchmarks/results/kernels_h100.json]
    python benchmarks/kernels_cuda.py --only prefill,chunk,suffix,mixed --backend triton,flashinfer

`--only`: attention whose name starts with one of these, copies of KV by `kv`, or from a second GPU by `peer`,
and nothing else.

`--backend flashinfer`: every sequence of `--long_query_len` new tokens or more by its kernels, which are
compiled first, where they are not; cases without such sequences are left out, they are Triton's. `plan_us` is
the time of the host for a step's plan and that of its first layer, beside the kernels of the device.

Ceilings are measured in the same run: a large copy and read, a large matrix product. Times are medians over
repeats that rotate over several input sets where these fit into the cache.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
import triton
from machine import describe_run

from lightllm.attention.base import AttentionBackend, AttentionLayer
from lightllm.attention.flashinfer_kernels import load_kernels
from lightllm.attention.flashinfer_prefill import LONG_QUERY_LEN, FlashInferAttention
from lightllm.attention.triton_gqa import TritonAttention
from lightllm.device.forward_batch import DeviceIndex, ForwardBatch
from lightllm.device.kv_pool import KVPool
from lightllm.kernels import kv_rows
from lightllm.layers.ops import Ops
from lightllm.layers.triton_ops import TritonOps
from lightllm.model_config import ModelConfig

DEVICE = torch.device("cuda")
# name: (num_q_heads, num_kv_heads, head_dim), [(number of sequences, seq_len, query_len)]
ATTENTION = {
    "decode 100 x 1100, 32 heads": ((32, 32, 128), [(100, 1100, 1)]),
    "decode 256 x 400, 32 heads": ((32, 32, 128), [(256, 400, 1)]),
    "decode 64 x 2048, 32 heads": ((32, 32, 128), [(64, 2048, 1)]),
    "decode 1 x 640, 32 heads": ((32, 32, 128), [(1, 640, 1)]),
    "decode 1 x 16384, 32 heads": ((32, 32, 128), [(1, 16384, 1)]),
    "decode 64 x 4096, 64/8 heads": ((64, 8, 128), [(64, 4096, 1)]),
    "decode 8 x 8192, 28/4 heads": ((28, 4, 128), [(8, 8192, 1)]),
    "prefill 8 x 1024, 32 heads": ((32, 32, 128), [(8, 1024, 1024)]),
    "prefill 2 x 4096, 32 heads": ((32, 32, 128), [(2, 4096, 4096)]),
    "prefill 2 x 4096, 64/8 heads": ((64, 8, 128), [(2, 4096, 4096)]),
    "prefill 64 x 128, 32 heads": ((32, 32, 128), [(64, 128, 128)]),
    "prefill 32 x 256, 32 heads": ((32, 32, 128), [(32, 256, 256)]),
    "prefill 16 x 512, 32 heads": ((32, 32, 128), [(16, 512, 512)]),
    "prefill 32 x 256, 28/4 heads": ((28, 4, 128), [(32, 256, 256)]),
    "prefill 16 x 512, 28/4 heads": ((28, 4, 128), [(16, 512, 512)]),
    "prefill 1 x 1024, 28/4 heads": ((28, 4, 128), [(1, 1024, 1024)]),
    "prefill 1 x 8192, 28/4 heads": ((28, 4, 128), [(1, 8192, 8192)]),
    "chunk 1 x 256 behind 3840, 28/4 heads": ((28, 4, 128), [(1, 4096, 256)]),
    "chunk 1 x 512 behind 3584, 28/4 heads": ((28, 4, 128), [(1, 4096, 512)]),
    "chunk 1 x 2048 behind 14336, 28/4 heads": ((28, 4, 128), [(1, 16384, 2048)]),
    "chunk 1 x 512 behind 3584, 32 heads": ((32, 32, 128), [(1, 4096, 512)]),
    "mixed 64 x 1100 + 1024, 32 heads": ((32, 32, 128), [(64, 1100, 1), (1, 1024, 1024)]),
    "suffix 64 x 128 behind 1920, 32 heads": ((32, 32, 128), [(64, 2048, 128)]),
}


def measure(function) -> float:
    """Median seconds."""
    return triton.testing.do_bench(function, warmup=20, rep=100, return_mode="median") * 1e-3


def host_time(function) -> float:
    """Median seconds until a call returns, with nothing on the device to wait for."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def ceilings() -> dict[str, float]:
    a = torch.randn(2**30, device=DEVICE).to(torch.bfloat16)
    b = torch.empty_like(a)
    x = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    found = {
        "copy_gb_s": 2 * a.nbytes / measure(lambda: b.copy_(a)) / 1e9,
        "read_gb_s": a.nbytes / measure(lambda: a.view(torch.float32).amax()) / 1e9,
        "matmul_tflop_s": 2 * 8192**3 / measure(lambda: x @ x) / 1e12,
    }
    return {name: round(value, 1) for name, value in found.items()}


def model_of(heads) -> ModelConfig:
    num_q_heads, num_kv_heads, head_dim = heads
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=num_q_heads * head_dim,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=num_q_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=8,
        max_position_embeddings=1 << 20,
        rms_norm_eps=1e-5,
    )


def make_backend(name: str, config: ModelConfig, long_query_len: int) -> AttentionBackend:
    if name == "triton":
        return TritonAttention.for_model(config)
    problem = load_kernels(config, torch.bfloat16, DEVICE, may_compile=True)
    if problem is not None:
        raise SystemExit(problem)
    return FlashInferAttention(config.num_attention_heads, config.head_dim, long_query_len)


def attention_case(name, long_query_len, heads, groups) -> dict[str, float]:
    """Seconds of a layer and of a plan, bytes of keys and values read at least once, operations on floats."""
    num_q_heads, num_kv_heads, head_dim = heads
    seq_lens = np.array([n for count, n, _ in groups for _ in range(count)])
    query_lens = np.array([c for count, _, c in groups for _ in range(count)])
    config = model_of(heads)
    num_slots = int(seq_lens.sum()) + 1
    pool = KVPool(config, num_slots, torch.bfloat16, DEVICE)
    for tensor in (*pool.k, *pool.v):
        tensor.normal_()
    table = np.zeros((len(seq_lens) + 1, seq_lens.max() + 1), dtype=np.int32)
    # Regions of 64 slots in random order, as a pool in use has them.
    regions = np.random.default_rng(0).permutation((num_slots - 1) // 64 + 1) * 64
    slots = (regions[:, None] + np.arange(64)).reshape(-1)
    slots = slots[(slots > 0) & (slots < num_slots)]
    for row, part in enumerate(np.split(slots, seq_lens.cumsum())[:-1]):
        table[row, : len(part)] = part
    rows = np.arange(len(seq_lens))
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(seq_lens, query_lens, strict=True)])

    def device(array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)

    batch = ForwardBatch.build(
        rows=rows,
        seq_lens=seq_lens,
        query_lens=query_lens,
        positions=device(positions),
        out_slots=device(table[rows.repeat(query_lens), positions].astype(np.int64)),
        slot_table=np.empty((0, 0), dtype=np.int32),
        kv_pool=pool,
        index=DeviceIndex(device(table), device(rows.astype(np.int32)), device(seq_lens.astype(np.int32))),
    )
    backend = make_backend(name, config, long_query_len)
    batch.plan = backend.plan(batch)
    qkv = torch.randn(len(positions), num_q_heads + 2 * num_kv_heads, head_dim, device=DEVICE).bfloat16()
    q, k, v = qkv.split([num_q_heads, num_kv_heads, num_kv_heads], 1)
    layers = [AttentionLayer(i, head_dim**-0.5) for i in range(2)]

    def run():
        for layer in layers:
            backend.forward(q, k, v, layer, batch)

    graph = torch.cuda.CUDAGraph()
    run()
    with torch.cuda.graph(graph):
        run()
    seconds = measure(graph.replay) / 2
    del graph  # it runs on the plan's memory, which is used anew from here on

    def plan_and_launch_one():
        batch.plan = backend.plan(batch)
        backend.forward(q, k, v, layers[0], batch)

    def launch_one():
        backend.forward(q, k, v, layers[0], batch)

    pairs = int((query_lens * (2 * seq_lens - query_lens + 1) // 2).sum())
    return {
        "seconds": seconds,
        "plan_seconds": host_time(plan_and_launch_one) - host_time(launch_one),
        "num_bytes": 2 * int(seq_lens.sum()) * num_kv_heads * head_dim * 2,
        "operations": 4.0 * pairs * num_q_heads * head_dim,
    }


# KiB of a tile, warps, programs.
PEER_SETTINGS = (
    (16, 4, 128),
    (16, 4, 64),
    (16, 4, 32),
    (32, 8, 64),
    (32, 8, 32),
    (64, 16, 32),
    (64, 16, 16),
    (128, 32, 16),
    (128, 32, 8),
)
KV_ROWS = {"28 layers, 1 KiB": (28, 128), "32 layers, 8 KiB": (32, 1024)}


def kv_row_rates() -> dict[str, dict[str, float]]:
    """GB/s, read and written, of 4,096 scattered slots into others, by shape and number of programs."""
    found: dict[str, dict[str, float]] = {}
    default = kv_rows.MAX_PROGRAMS
    for name, (layers, row) in KV_ROWS.items():
        rows = torch.zeros(2 * layers, 8192, row, dtype=torch.int64, device=DEVICE)
        slots = torch.randperm(8192, device=DEVICE)
        source, target = slots[:4096], slots[4096:]
        found[name] = {}
        for programs in (16, 32, 64, 128, 256, 512):
            kv_rows.MAX_PROGRAMS = programs
            pull = kv_rows.prepare_pull(rows.data_ptr(), 8192, row, source, rows, target)
            seconds = measure(pull)
            found[name][str(programs)] = round(2 * 4096 * 2 * layers * row * 8 / seconds / 1e9, 1)
    kv_rows.MAX_PROGRAMS = default
    return found


def peer_row_rates() -> dict[str, dict[str, object]]:
    """Pulling 4,096 scattered slots from the second GPU, by shape, KiB of a tile, warps, and programs.

    GB/s, and the milliseconds by which it delays a run of matrix products like a decode step's.
    """
    names = ("MAX_PROGRAMS", "TILE_BYTES", "NUM_WARPS")
    defaults = {name: getattr(kv_rows, name) for name in names}
    weights = [torch.zeros(4096, 22016, dtype=torch.bfloat16, device=DEVICE) for _ in range(8)]
    x = torch.zeros(32, 4096, dtype=torch.bfloat16, device=DEVICE)
    products = [partial(torch.matmul, x, weight) for weight in weights] * 10
    found: dict[str, dict[str, object]] = {}
    for name, (layers, row) in KV_ROWS.items():
        theirs = torch.zeros(2 * layers, 8192, row, dtype=torch.int64, device="cuda:1")
        ours = torch.zeros_like(theirs, device=DEVICE)
        theirs.copy_(ours)  # has torch let the first GPU into the second one's memory, for the kernel
        plain = measure(lambda ours=ours, theirs=theirs: ours.copy_(theirs))
        found[name] = {"plain copy": round(theirs.nbytes / plain / 1e9, 1)}
        slots = torch.randperm(8192, device=DEVICE)
        source, target = slots[:4096], slots[4096:]
        alone_ms = delayed_ms(products, lambda: None)
        found[name]["products alone, ms"] = round(alone_ms, 2)
        for tile_kib, warps, programs in PEER_SETTINGS:
            values = programs, tile_kib * 1024, warps
            for setting, value in zip(names, values, strict=True):
                setattr(kv_rows, setting, value)
            pull = kv_rows.prepare_pull(theirs.data_ptr(), 8192, row, source, ours, target)
            rate = theirs.nbytes / 2 / measure(pull) / 1e9
            delay_ms = delayed_ms(products, pull) - alone_ms
            found[name][f"{tile_kib} KiB, {warps} warps x {programs}"] = (round(rate, 1), round(delay_ms, 2))
    for setting, default in defaults.items():
        setattr(kv_rows, setting, default)
    return found


def delayed_ms(works: list[Callable[[], object]], pull: Callable[[], None]) -> float:
    """How long these take one after the other with `pull` beside them; median."""
    side, durations = torch.cuda.Stream(), []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000)  # until all is queued
        begin.record()
        side.wait_event(begin)
        for index, work in enumerate(works):
            work()
            if not index:
                with torch.cuda.stream(side):
                    pull()
        end.record()
        torch.cuda.synchronize()
        durations.append(begin.elapsed_time(end))
    return statistics.median(durations)


def op_cases(ops: Ops, n: int) -> dict[str, tuple]:
    """Name -> function and bytes moved, at the widths of Llama-2-7B."""
    x = torch.randn(n, 4096, device=DEVICE).bfloat16()
    residual, weight = torch.randn_like(x), torch.ones(4096, device=DEVICE).bfloat16()
    qk = torch.randn(n, 64, 128, device=DEVICE).bfloat16()
    angles = torch.randn(n, 64, device=DEVICE)
    gate_up = torch.randn(n, 2 * 11008, device=DEVICE).bfloat16()
    return {
        "add_rms_norm": (lambda: ops.add_rms_norm(x, residual, weight, 1e-5), 4 * x.nbytes),
        "rotate_": (lambda: ops.rotate_(qk, angles, angles), 2 * qk.nbytes),
        "silu_and_mul": (lambda: ops.silu_and_mul(gate_up), gate_up.nbytes * 3 // 2),
    }


def gemv_cases() -> dict[str, dict]:
    """The linears of Llama-2-7B for one row, against the vendor's library; weights rotate."""
    found = {}
    for num_rows, num_columns in ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096)):
        count = max(2, 400_000_000 // (num_rows * num_columns * 2))
        weights = [torch.randn(num_rows, num_columns, device=DEVICE).bfloat16() for _ in range(count)]
        x = torch.randn(1, num_columns, device=DEVICE).bfloat16()
        times = []
        for ops in (Ops(), TritonOps()):
            linears = [ops.dense_linear(weight, None) for weight in weights]
            linears[0](x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for linear in linears:
                    linear(x)
            times.append(measure(graph.replay) / count)
        plain, fused = times
        found[f"{num_rows} x {num_columns}"] = {
            "us": round(fused * 1e6, 1),
            "plain_us": round(plain * 1e6, 1),
            "gb_s": round(num_rows * num_columns * 2 / fused / 1e9),
        }
    return found


def add_other_cases(result: dict) -> None:
    """Measure linears of one row and elementwise kernels."""
    result["gemv"] = gemv_cases()
    for name, entry in result["gemv"].items():
        print(f"gemv {name:16s} {msgspec.json.encode(entry).decode()}", flush=True)
    for n in (1, 64, 256, 8192):
        plain, fused = op_cases(Ops(), n), op_cases(TritonOps(), n)
        for name, (function, num_bytes) in fused.items():
            seconds, plain_seconds = measure(function), measure(plain[name][0])
            entry = {
                "us": round(seconds * 1e6, 1),
                "plain_us": round(plain_seconds * 1e6, 1),
                "gb_s": round(num_bytes / seconds / 1e9),
            }
            result["ops"][f"{name} {n}"] = entry
            print(f"{name:16s} {n:5d} {msgspec.json.encode(entry).decode()}", flush=True)


def add_attention_cases(entries: dict, backend: str, args: argparse.Namespace, limits: dict) -> None:
    """Measure the cases that are asked for and that this backend has kernels for."""
    for name, (heads, groups) in ATTENTION.items():
        longest = max(query_len for _, _, query_len in groups)
        if args.only and not name.startswith(args.only):
            continue
        if backend == "flashinfer" and longest < args.long_query_len:
            continue
        found = attention_case(backend, args.long_query_len, heads, groups)
        rate = found["num_bytes"] / found["seconds"] / 1e9
        entries[name] = {
            "us": round(found["seconds"] * 1e6, 1),
            "plan_us": round(found["plan_seconds"] * 1e6, 1),
            "gb_s": round(rate),
            "share_of_read": round(rate / limits["read_gb_s"], 3),
            "tflop_s": round(found["operations"] / found["seconds"] / 1e12, 1),
        }
        print(f"{backend:10s} {name:40s} {msgspec.json.encode(entries[name]).decode()}", flush=True)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=lambda text: tuple(text.split(",")), help="first words of cases")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--backend", type=lambda text: text.split(","), default=["triton"])
    parser.add_argument("--long_query_len", type=int, default=LONG_QUERY_LEN)
    args = parser.parse_args()
    limits = ceilings()
    result = {**describe_run(), "ceilings": limits, "attention": {}, "ops": {}}
    print(json.dumps(limits))
    for backend in args.backend:
        add_attention_cases(result["attention"].setdefault(backend, {}), backend, args, limits)
    if not args.only or "kv rows".startswith(args.only):
        result["kv_rows"] = kv_row_rates()
        for name, rates in result["kv_rows"].items():
            print(f"kv rows {name:20s} {msgspec.json.encode(rates).decode()}", flush=True)
    if torch.cuda.device_count() > 1 and (not args.only or "peer rows".startswith(args.only)):
        result["peer_rows"] = peer_row_rates()
        for name, rates in result["peer_rows"].items():
            print(f"peer rows {name:20s} {msgspec.json.encode(rates).decode()}", flush=True)
    if not args.only:
        add_other_cases(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
