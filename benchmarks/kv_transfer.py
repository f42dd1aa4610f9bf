"""How fast KV moves between two engines of one machine, and how late an idle one hears of it.

    python benchmarks/kv_transfer.py [--device cuda] [--shapes qwen2-7b,llama2-7b] [--lengths 1024,8192]
                                     [--lanes p2p,shm,nixl,tcp] [--repeat 5] [--out FILE.json]

Two processes with KV pools and no model; with --device cuda both on the first GPU, unless
CUDA_VISIBLE_DEVICES lists two: then the receiver is on the second. For each lane and length: bytes per second
from the moment when the KV is computed to the sender's confirmation, slots in runs and scattered, for KV that
is ordered behind the step that computes it, or during that step, as KV of prompts is; the same for four
requests of one step, until all are confirmed; how long behind the end of a step that is where the KV was
computed some milliseconds before that, as it is when the last layer still has something to do; and the delay
from there until a receiver that sleeps until it is told, as an idle engine does, has heard of it (it may be
earlier). For one request ordered during its step also what happened when at both ends, which have one clock.
Beside it the rates of plain copies. Prints a table to stderr and one JSON object, medians and best runs.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import describe_run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightllm.device.base import Moment, PastMoment, make_device
from lightllm.device.kv_pool import KVPool, kv_bytes_per_token
from lightllm.distributed.shares import kv_head_ranges
from lightllm.messages import KVLayout, KVSource, KVTarget, KVTransferOrder
from lightllm.model_config import ModelConfig
from lightllm.packed_ints import Ints, pack
from lightllm.transfer import LANES
from lightllm.transfer.base import Endings, Limits
from lightllm.transfer.channel import Channel
from lightllm.transfer.lane import LaneUnavailable, open_lanes
from lightllm.transfer.link import KVLink
from lightllm.transfer.plan import HostRows
from lightllm.transfer.shipment import Node

# name: (layers, KV heads, head_dim, dtype)
SHAPES = {
    "smollm2-135m": (30, 3, 64, torch.float32),
    "qwen2-7b": (28, 4, 128, torch.bfloat16),
    "llama2-7b": (32, 32, 128, torch.bfloat16),
}
NUM_SLOTS = 40_960
STEP_S = 0.01
TOKEN = b"a token for measurements only"
DEFAULTS = {
    "cpu": {"shapes": "smollm2-135m", "lengths": "128,1024,8192", "lanes": "shm,nixl,tcp"},
    "cuda": {"shapes": "qwen2-7b,llama2-7b", "lengths": "1024,8192", "lanes": "p2p,shm,nixl,tcp"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name in ("shapes", "lengths", "lanes"):
        parser.add_argument(f"--{name}", help="with commas")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--receive", metavar="LANE", help="be the receiver; started by the program itself")
    args = parser.parse_args()
    defaults = DEFAULTS[args.device]
    shapes, lengths, lanes = (
        (getattr(args, name) or defaults[name]).split(",") for name in ("shapes", "lengths", "lanes")
    )
    if args.receive:
        receive(args.receive, args.device, shapes[0])
        return
    assert set(lanes) <= set(LANES), f"lanes are {', '.join(LANES)}"
    rates, diary = copy_rates(args.device), Diary("sender")
    print(json.dumps(rates), file=sys.stderr, flush=True)
    report = {
        **describe_run(),
        **rates,
        "transfers": [
            entry
            for shape in shapes
            for lane in lanes
            for entry in measure(lane, args.device, shape, [int(n) for n in lengths], args.repeat, diary)
        ],
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", "utf-8")


class Diary:
    """When frames were sent and read in this process, and when a receiver's copy began and ended."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._lines: list[tuple[float, str]] = []
        send, receive = Channel.send, Channel.receive

        def noted_send(channel: Channel, frame: Any, limit_s: float) -> None:
            send(channel, frame, limit_s)
            self.note(f"{type(frame).__name__} sent")

        def noted_receive(channel: Channel, kind: Any, limit_s: float) -> Any:
            frame = receive(channel, kind, limit_s)
            self.note(f"{type(frame).__name__} read")
            return frame

        Channel.send, Channel.receive = noted_send, noted_receive  # type: ignore[method-assign]

    def watch(self, end: type[Any]) -> None:
        """Note when this lane's receiving ends copy."""
        unpack = end.unpack

        def noted_unpack(receiver: Any, slots: Any) -> None:
            self.note("copy begins")
            unpack(receiver, slots)
            self.note("copy is done")

        end.unpack = noted_unpack

    def note(self, text: str) -> None:
        """Something has happened now."""
        self._lines.append((time.monotonic(), f"{self._who}: {text}"))

    def take(self) -> list[tuple[float, str]]:
        """All since the last call."""
        lines, self._lines = self._lines, []
        return lines


def timeline(rounds: list[list[tuple[float, str]]]) -> dict[str, int]:
    """Medians over rounds of the last time that each thing happened, in microseconds, as they followed."""
    last = [{text: seconds for seconds, text in sorted(lines)} for lines in rounds]
    names = {text for one in last for text in one}
    shown = {
        name: round(statistics.median(one[name] for one in last if name in one) * 1e6)
        for name in names
        if sum(name in one for one in last) > len(last) // 2
    }
    return dict(sorted(shown.items(), key=lambda item: item[1]))


def model_of(shape: str) -> ModelConfig:
    layers, heads, head_dim, _ = SHAPES[shape]
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=heads * head_dim,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        vocab_size=8,
        max_position_embeddings=NUM_SLOTS,
        rms_norm_eps=1e-5,
    )


def open_link(lane: str, device_name: str, shape: str, epoch: int) -> KVLink:
    """A link over a pool whose pages are all there."""
    config, dtype = model_of(shape), SHAPES[shape][3]
    device = make_device(device_name)
    pool = KVPool(config, NUM_SLOTS, dtype, device.torch_device)
    pool.storage.fill_(1.0)
    device.synchronize()
    if device_name == "cpu":
        rows = HostRows(pool)
    else:
        from lightllm.transfer.device_rows import DeviceRows

        rows = DeviceRows(pool, device)
    name = str(dtype).removeprefix("torch.")
    layout = KVLayout(
        model_hash="",
        tokenizer_hash="",
        vocab_size=8,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=name,
        kv_dtype=name,
        tp_size=1,
    )
    node = Node(
        layout=layout,
        token=TOKEN,
        epoch=epoch,
        lanes=open_lanes((lane,), rows),
        limits=Limits(),
        head_ranges=partial(kv_head_ranges, config),
    )
    return KVLink(node, "127.0.0.1", 0)


def slots_of(case: "Case", part: int) -> Ints:
    """Slots of one of its requests, as a young or an old pool gives them out."""
    young = range(1 + part * case.count, 1 + (part + 1) * case.count)
    return pack(random.Random(part).sample(range(1, NUM_SLOTS), case.count) if case.is_scattered else young)


def wait(link: KVLink, count: int) -> Endings:
    """Sleep until so many transfers have ended."""
    news, found = threading.Event(), Endings([], [], [], [])
    link.watch(news.set)
    while True:
        for known, new in zip(found, link.poll(), strict=True):
            known.extend(new)
        if len(found.transfers) == count:
            return found
        news.wait()
        news.clear()


class Case(NamedTuple):
    """What is ordered.

    Attributes:
        count: tokens of a request.
        is_during: the order comes during the step that computes the KV, else behind it.
        at_once: so many requests.
        is_early: the step goes on for some milliseconds when its KV is computed.
    """

    count: int
    is_scattered: bool
    is_during: bool
    at_once: int
    is_early: bool = False

    def tickets(self, number: int) -> list[str]:
        """Of all its requests, in this round."""
        return [f"{number:>05}-{part:>010}" for part in range(self.at_once)]


CASES = (
    (False, False, 1),
    (True, False, 1),
    (False, True, 1),
    (True, True, 1),
    (False, True, 4),
    (False, True, 1, True),
    (False, True, 4, True),
)


def receive(lane: str, device_name: str, shape: str) -> None:
    """Expect what stdin says, line by line: a round and its case; answer with the time when all had come."""
    diary = Diary("receiver")
    link = open_link(lane, device_name, shape, 2)
    if lane == "p2p":
        from lightllm.transfer.p2p import _Receiver

        diary.watch(_Receiver)
    print(link.address, flush=True)
    for line in sys.stdin:
        number, fields = json.loads(line)
        case = Case(*fields)
        for part, ticket in enumerate(case.tickets(number)):
            order = KVTransferOrder(
                request_id=ticket,
                start=0,
                slots=slots_of(case, part),
                token_ids=pack([0] * case.count),
                source=KVSource(node_id="", epoch=1, ticket=ticket),
            )
            link.receive(order, PastMoment())
        print("expected", flush=True)
        wait(link, case.at_once)
        heard_s = time.monotonic()
        time.sleep(0.005)  # its thread has something to say yet
        print(json.dumps((heard_s, diary.take())), flush=True)
    link.close()


def receiver(lane: str, device_name: str, shape: str) -> subprocess.Popen:
    """Start the other process; on the second of two visible GPUs."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpus[1]} if len(gpus) > 1 else {})}
    options = ["--device", device_name, "--shapes", shape, "--receive", lane]
    command = [sys.executable, __file__, *options]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


class TimedMoment(Moment):
    """One of a CPU's step, so much later."""

    def __init__(self, after_s: float) -> None:
        self._done_s = time.monotonic() + after_s

    def wait(self) -> None:
        time.sleep(max(0.0, self._done_s - time.monotonic()))

    def is_past(self) -> bool:
        return time.monotonic() >= self._done_s


class Steps:
    """Begins what takes a device some STEP_S."""

    def __init__(self, device_name: str) -> None:
        self._device = make_device(device_name)
        if self._device.is_async:
            self._factor = torch.ones(8192, 8192, dtype=torch.bfloat16, device=self._device.torch_device)

    def begin(self, is_early: bool) -> tuple[Moment, Moment]:
        """Begin one; when its KV is computed, and its end: two, since one has one thread that is awake."""
        if not self._device.is_async:
            return TimedMoment(STEP_S / 2 if is_early else STEP_S), TimedMoment(STEP_S)
        self._compute()
        early = self._device.mark(is_urgent=True) if is_early else None
        self._compute()
        return early or self._device.mark(is_urgent=True), self._device.mark(is_urgent=True)

    def _compute(self) -> None:
        for _ in range(4):
            self._factor @ self._factor


def measure(
    lane: str, device_name: str, shape: str, lengths: list[int], repeat: int, diary: Diary
) -> list[dict[str, object]]:
    """All lengths over one lane."""
    try:
        link = open_link(lane, device_name, shape, 1)
    except LaneUnavailable as error:
        print(f"{shape} {lane}: left out: {error}", file=sys.stderr, flush=True)
        return [{"shape": shape, "lane": lane, "left_out": str(error)}]
    peer = receiver(lane, device_name, shape)
    assert peer.stdin is not None
    assert peer.stdout is not None
    address = peer.stdout.readline().strip()
    entries, number, steps = [], 0, Steps(device_name)
    for case in [Case(count, *more) for count in lengths for more in CASES]:
        durations, delays, rounds = [], [], []
        for i in range(repeat + 1):
            number += 1
            peer.stdin.write(json.dumps((number, case)) + "\n")
            peer.stdin.flush()
            assert peer.stdout.readline() == "expected\n"
            diary.take()
            started_s, ended_s = ship(link, orders_of(case, address, number), case, steps)
            heard_s, lines = json.loads(peer.stdout.readline())
            lines += [*diary.take(), (ended_s, "sender: its engine has heard")]
            if i:  # the first compiles kernels and opens memory
                durations.append(ended_s - started_s)
                delays.append(heard_s - ended_s)
                rounds.append([(at_s - started_s, text) for at_s, text in lines])
        entries.append(entry(lane, shape, case, durations, delays))
        if case.is_during and case.at_once == 1:
            entries[-1]["us_behind_the_step"] = timeline(rounds)
        print(in_words(entries[-1]), file=sys.stderr, flush=True)
    link.close()
    peer.stdin.close()
    peer.wait()
    return entries


def ship(link: KVLink, orders: list[KVTransferOrder], case: Case, steps: Steps) -> tuple[float, float]:
    """When the step was over, and when all was confirmed."""
    written, end = steps.begin(case.is_early) if case.is_during else (PastMoment(), PastMoment())
    started_s = time.monotonic()
    for order in orders:
        link.send(order, written)
    if case.is_during:
        end.wait()
        started_s = time.monotonic()
    for order in orders:
        link.complete(order.request_id, 0)
    endings = wait(link, len(orders))
    assert len(endings.sent) == len(orders), endings
    return started_s, time.monotonic()


def orders_of(case: Case, address: str, number: int) -> list[KVTransferOrder]:
    """Everything of each request in one order."""
    return [
        KVTransferOrder(
            request_id=ticket,
            start=0,
            slots=slots_of(case, part),
            token_ids=pack([0] * case.count),
            target=KVTarget(node_id="", epoch=2, address=address, ticket=ticket),
        )
        for part, ticket in enumerate(case.tickets(number))
    ]


def entry(
    lane: str, shape: str, case: Case, durations: list[float], delays: list[float]
) -> dict[str, object]:
    """One line of the report."""
    num_bytes = case.at_once * case.count * kv_bytes_per_token(model_of(shape), SHAPES[shape][3])
    rates = {
        "gb_per_s_median": round(num_bytes / statistics.median(durations) / 1e9, 2),
        "gb_per_s_best": round(num_bytes / min(durations) / 1e9, 2),
    }
    return {
        "lane": lane,
        "shape": shape,
        "tokens": case.count,
        "at_once": case.at_once,
        "slots": "scattered" if case.is_scattered else "in runs",
        "ordered": "during its step" if case.is_during else "behind its step",
        "computed": "before the step's end" if case.is_early else "at the step's end",
        "mb": round(num_bytes / 1e6, 1),
        "ms_median": round(statistics.median(durations) * 1e3, 2),
        **({} if case.is_early else rates),
        "noticed_after_ms_median": round(statistics.median(delays) * 1e3, 2),
        "noticed_after_ms_worst": round(max(delays) * 1e3, 2),
    }


def copy_rates(device_name: str) -> dict[str, object]:
    """GB/s of plain copies: in memory by one thread; on a GPU inside its memory, and to and from the host."""
    torch.set_num_threads(1)
    host = torch.ones(64_000_000)
    rates: dict[str, object] = {"copy_gb_per_s": copy_rate(torch.empty_like(host), host)}
    if device_name == "cuda":
        pinned, device = host.pin_memory(), host.to("cuda")
        rates["gpu"] = torch.cuda.get_device_name()
        rates["device_copy_gb_per_s"] = copy_rate(torch.empty_like(device), device)
        rates["to_host_gb_per_s"] = copy_rate(pinned, device)
        rates["to_device_gb_per_s"] = copy_rate(device, pinned)
        if torch.cuda.device_count() > 1:
            rates["peer_copy_gb_per_s"] = copy_rate(device.to("cuda:1"), device)
    return rates


def copy_rate(target: torch.Tensor, source: torch.Tensor) -> float:
    """Best of some."""
    durations = []
    for _ in range(6):
        started_s = time.perf_counter()
        target.copy_(source)
        if target.is_cuda or source.is_cuda:
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - started_s)
    return round(source.nbytes / min(durations) / 1e9, 2)


def in_words(line: dict) -> str:
    """One line of the table."""
    what = f"{line['lane']:4} {line['shape']:13} {line['at_once']} x {line['tokens']:6}"
    where = f"{what} {line['slots']:9} {line['ordered']:15} {line['computed']:21}"
    rate = (
        f"{line['gb_per_s_median']:8} GB/s (best {line['gb_per_s_best']})" if "gb_per_s_best" in line else ""
    )
    return f"{where} {line['mb']:8} MB {line['ms_median']:9} ms {rate}"


if __name__ == "__main__":
    main()
