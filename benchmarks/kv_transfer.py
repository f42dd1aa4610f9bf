"""How fast KV moves between two engines of one machine, and how late an idle one notices.

    python benchmarks/kv_transfer.py [--repeat 5] [--out FILE.json]

Two processes with KV pools of the default model's shape in float32, no model. For each lane and length: bytes
per second from the sender's order to its confirmation, slots in runs and scattered; and the delay from there
until a receiver that asks every 2 ms, as an idle engine does, has heard of it. Beside it the rate of a plain
copy in memory. Prints one JSON object, medians and best runs.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from machine import describe_run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightllm.device.base import PastMoment
from lightllm.device.kv_pool import KVPool
from lightllm.messages import KVLayout, KVSource, KVTarget, KVTransferOrder
from lightllm.model_config import ModelConfig
from lightllm.transfer import LANES
from lightllm.transfer.base import Limits
from lightllm.transfer.lane import open_lanes
from lightllm.transfer.link import KVLink
from lightllm.transfer.plan import HostRows
from lightllm.transfer.shipment import Node

MODEL = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
    }
)
NUM_SLOTS = 16_384
LENGTHS = (128, 1024, 8192)
POLL_S = 0.002
TOKEN = b"a token for measurements only"
LAYOUT = KVLayout(
    model_hash="",
    tokenizer_hash="",
    vocab_size=49152,
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    dtype="float32",
    kv_dtype="float32",
    tp_size=1,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--receive", metavar="LANE", help="be the receiver; started by the program itself")
    args = parser.parse_args()
    if args.receive:
        receive(args.receive)
        return
    report = {
        **describe_run(),
        "copy_gb_per_s": copy_rate(),
        "transfers": [entry for lane in LANES for entry in measure(lane, args.repeat)],
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", "utf-8")


def open_link(lane: str, epoch: int) -> KVLink:
    """A link over a pool whose pages are all there."""
    pool = KVPool(MODEL, NUM_SLOTS, torch.float32)
    for tensor in (*pool.k, *pool.v):
        tensor.fill_(1.0)
    node = Node(
        layout=LAYOUT,
        token=TOKEN,
        epoch=epoch,
        lanes=open_lanes((lane,), HostRows(pool)),
        limits=Limits(),
    )
    return KVLink(node, "127.0.0.1", 0)


def slots_of(count: int, is_scattered: bool) -> list[int]:
    """Slots as a young or an old pool gives them out."""
    return random.Random(count).sample(range(1, NUM_SLOTS), count) if is_scattered else [*range(1, count + 1)]


def receive(lane: str) -> None:
    """Expect what stdin says, line by line: ticket, tokens, scattered; answer with the time of arrival."""
    link = open_link(lane, 2)
    print(link.address, flush=True)
    for line in sys.stdin:
        ticket, count, is_scattered = line.split()
        order = KVTransferOrder(
            request_id=ticket,
            start=0,
            slots=slots_of(int(count), is_scattered == "True"),
            token_ids=[0] * int(count),
            source=KVSource(node_id="", epoch=1, ticket=ticket),
        )
        link.receive(order, PastMoment())
        print("expected", flush=True)
        while not any(link.poll()):
            time.sleep(POLL_S)
        print(time.monotonic(), flush=True)


def measure(lane: str, repeat: int) -> list[dict[str, object]]:
    """All lengths over one lane."""
    command = [sys.executable, __file__, "--receive", lane]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert peer.stdin is not None
    assert peer.stdout is not None
    address = peer.stdout.readline().strip()
    link = open_link(lane, 1)
    entries = []
    for count in LENGTHS:
        for is_scattered in (False, True):
            durations, delays = [], []
            for i in range(repeat):
                ticket = f"ticket-{count}-{is_scattered}-{i}"
                peer.stdin.write(f"{ticket} {count} {is_scattered}\n")
                peer.stdin.flush()
                assert peer.stdout.readline() == "expected\n"
                started_s = time.monotonic()
                link.send(order(ticket, count, is_scattered, address), PastMoment())
                link.complete(ticket, 0)
                while not any(endings := link.poll()):
                    time.sleep(0.0002)
                ended_s = time.monotonic()
                assert endings.sent == [ticket], endings
                durations.append(ended_s - started_s)
                delays.append(float(peer.stdout.readline()) - ended_s)
            entries.append(entry(lane, count, is_scattered, durations, delays))
    link.close()
    peer.stdin.close()
    peer.wait()
    return entries


def order(ticket: str, count: int, is_scattered: bool, address: str) -> KVTransferOrder:
    """Everything of a request in one order."""
    return KVTransferOrder(
        request_id=ticket,
        start=0,
        slots=slots_of(count, is_scattered),
        token_ids=[0] * count,
        target=KVTarget(node_id="", epoch=2, address=address, ticket=ticket),
    )


def entry(
    lane: str, count: int, is_scattered: bool, durations: list[float], delays: list[float]
) -> dict[str, object]:
    """One line of the report."""
    num_bytes = count * 2 * 30 * 3 * 64 * 4
    return {
        "lane": lane,
        "tokens": count,
        "slots": "scattered" if is_scattered else "in runs",
        "mb": round(num_bytes / 1e6, 1),
        "ms_median": round(statistics.median(durations) * 1e3, 2),
        "gb_per_s_median": round(num_bytes / statistics.median(durations) / 1e9, 2),
        "gb_per_s_best": round(num_bytes / min(durations) / 1e9, 2),
        "noticed_after_ms_median": round(statistics.median(delays) * 1e3, 2),
        "noticed_after_ms_worst": round(max(delays) * 1e3, 2),
    }


def copy_rate() -> float:
    """GB/s of a copy from memory to memory in one thread."""
    torch.set_num_threads(1)
    source = torch.ones(64_000_000)
    target = torch.empty_like(source).copy_(source)
    durations = []
    for _ in range(5):
        started_s = time.perf_counter()
        target.copy_(source)
        durations.append(time.perf_counter() - started_s)
    return round(source.numel() * 4 / min(durations) / 1e9, 2)


if __name__ == "__main__":
    main()
