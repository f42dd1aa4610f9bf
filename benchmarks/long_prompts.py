"""How long streams stand still because somebody else sends a long prompt.

    python benchmarks/long_prompts.py [--count 24] [--parts master engine]
    [--out benchmarks/results/long_prompts.json]

`master`: streams of fake nodes, a step per millisecond, pass through a pd_master (`master_process`, on a core
of its own), and every quarter of a second a prompt comes with max_new_tokens 1, which the prefill node takes
alone. Measured is how late tokens come behind the node's send: of each prompt the latest one in a window
around it; the first row has the same windows without prompts. `engine`: the turns of an engine's loop, codec,
socket and the worker's tables included, but no model, while 32 requests decode: of each prompt the longest of
the turns from its arrival until it is forgotten.
"""

import argparse
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import zmq
from machine import describe_run
from router_run import Cores, Feeder, Load, ended, master
from stream_client import arrivals, open_streams, read_timed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightllm import messages
from lightllm.engine.core import Engine
from lightllm.engine.executor import Executor, Pending
from lightllm.engine.link import ZmqLink
from lightllm.messages import EngineInfo, EngineRequest, ScheduledBatch, StepOutput
from lightllm.packed_ints import pack
from lightllm.sampling_params import SamplingParams
from lightllm.scheduler.config import SchedulerConfig
from lightllm.scheduler.scheduler import Scheduler
from lightllm.server.child import settle_memory
from lightllm.worker.inputs import RowTables

VOCAB_SIZE = 150_000
STREAMS, STEP_MS = 4, 1.0
GAP_S, BEGIN_S = 0.25, 0.5
WINDOW_S = (-0.005, 0.06)
PROMPTS = ("none", "8000 ids", "32000 ids", "30000 characters")
DECODING, CHUNK_TOKENS = 32, 8192


def prompt_of(what: str, index: int) -> list[int] | str:
    """The inputs of a request; no two begin alike."""
    rng = random.Random(f"{what} {index}")
    size, kind = what.split()
    if kind == "ids":
        return [rng.randrange(VOCAB_SIZE) for _ in range(int(size))]
    return "".join(rng.choice("abcdefg hijklmn opqrs tuvwxyz") for _ in range(int(size)))


# ------------------------------------------------------------ the pd_master


class Prompts:
    """Sends prompts one after the other from a thread; everything is encoded before.

    Attributes:
        sent_s: monotonic time of each.
    """

    def __init__(self, port: int, what: str, count: int) -> None:
        self.sent_s: list[float] = []
        self._port = port
        self._requests = [_request(prompt_of(what, i)) if what != "none" else b"" for i in range(count)]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self, at_s: float) -> None:
        """Send the first one then."""
        self._at_s = at_s
        self._thread.start()

    def _run(self) -> None:
        with socket.create_connection(("127.0.0.1", self._port)) as client:
            for i, request in enumerate(self._requests):
                time.sleep(max(0.0, self._at_s + i * GAP_S - time.monotonic()))
                self.sent_s.append(time.monotonic())
                if request:
                    client.sendall(request)
                    answer = client.recv(1 << 16)
                    while not answer.endswith(b"}"):
                        answer += client.recv(1 << 16)
                    if not answer.startswith(b"HTTP/1.1 200"):
                        raise SystemExit(f"a prompt was refused: {answer[:400]!r}")

    def end(self) -> list[float]:
        """Times of all, once they are sent."""
        self._thread.join(timeout=GAP_S * len(self._requests) + 10)
        assert len(self.sent_s) == len(self._requests), f"only {len(self.sent_s)} prompts were answered"
        return self.sent_s


def _request(inputs: list[int] | str) -> bytes:
    data = json.dumps({"inputs": inputs, "parameters": {"max_new_tokens": 1}}).encode()
    lines = ("host: x", "content-type: application/json", f"content-length: {len(data)}")
    return "\r\n".join(("POST /generate HTTP/1.1", *lines, "", "")).encode() + data


def late_ms(what: str, count: int, cores: Cores) -> list[float]:
    """Of each prompt, how late the latest token around it came."""
    tokens = round((BEGIN_S + GAP_S * (count + 1)) * 1000 / STEP_MS)
    load = Load(streams=STREAMS, tokens=tokens, step_ms=STEP_MS)
    with master(cores.routers[0], vocab_size=VOCAB_SIZE) as router:
        arguments = ["--master", f"127.0.0.1:{router.port}", *load.arguments()]
        feeder = Feeder("fake_nodes.py", arguments, cores.nodes)
        with ended(feeder.process):
            assert feeder.line() == ["ready"]
            clients = open_streams([router.port], STREAMS, tokens, "generate_stream")
            prompts = Prompts(router.port, what, count)
            prompts.begin(float(feeder.line()[1]) + BEGIN_S)
            answers = read_timed(clients, is_awake=cores.are_clients_alone)
            sent = json.loads(" ".join(feeder.line()))
            times = prompts.end()
    steps = [
        (sent_s, (at_s - sent_s) * 1000)
        for pieces in answers.pieces
        for sent_s, (at_s, _) in zip(sent["A"], arrivals(pieces)[1:], strict=True)
    ]
    before_s, behind_s = WINDOW_S
    return [
        max(late for at_s, late in steps if prompt_s + before_s <= at_s < prompt_s + behind_s)
        for prompt_s in times
    ]


# ------------------------------------------------------------ the engine


class TablesOnly(Executor):
    """Takes batches over into a worker's tables and computes nothing, in the caller's thread."""

    def __init__(self, max_len: int) -> None:
        self.tables = RowTables(DECODING + 8, max_len)

    def submit(self, batch: ScheduledBatch) -> Pending:
        """Make up the result, as a Future that is done."""
        self.tables.apply(batch)
        self.tables.inputs(batch)
        done: Future[StepOutput] = Future()
        token_ids = [[7] if is_sampling else [] for is_sampling in batch.is_sampling]
        done.set_result(StepOutput(step_id=batch.step_id, token_ids=token_ids))
        return done

    def info(self) -> EngineInfo:
        """Not asked for here."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to free."""


def turns_ms(what: str, count: int) -> list[float]:
    """Of each prompt, the longest turn of the loop from its arrival until it is forgotten."""
    config = SchedulerConfig(
        num_slots=200_000,  # few enough that what earlier prompts left behind is evicted
        max_running=DECODING + 8,
        batch_max_tokens=2 * CHUNK_TOKENS,
        chunked_prefill_size=CHUNK_TOKENS,
        max_req_total_len=65_536,
    )
    encoded = []
    for i in range(count):
        ids = prompt_of(what, i) if what != "none" else []
        assert isinstance(ids, list), "texts do not reach an engine"
        params = SamplingParams(max_new_tokens=1, ignore_eos=True)
        request = EngineRequest(request_id=f"long {i}", prompt_token_ids=pack(ids), sampling_params=params)
        encoded.append(messages.encode(request) if ids else b"")
    longest = []
    with tempfile.TemporaryDirectory() as folder:
        context = zmq.Context()
        inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        inbox.bind(f"ipc://{folder}/frontend")
        link = ZmqLink(f"ipc://{folder}/engine", f"ipc://{folder}/frontend")
        outbox.connect(f"ipc://{folder}/engine")
        engine = Engine(Scheduler(config), TablesOnly(config.max_req_total_len), link)
        params = SamplingParams(max_new_tokens=60_000, ignore_eos=True)
        for i in range(DECODING):
            prompt = [i, *range(255)]
            request = EngineRequest(request_id=f"s{i}", prompt_token_ids=pack(prompt), sampling_params=params)
            engine.scheduler.add(request, time.time())
        for data in [b"", *encoded]:
            _turns(engine, inbox, 20)
            if data:
                outbox.send(data)
                time.sleep(0.005)  # until it is there
            longest.append(max(_turns(engine, inbox, 20)))
        link.close()
        context.destroy(linger=0)
    return longest[1:]


def _turns(engine: Engine, inbox: "zmq.Socket[bytes]", count: int) -> list[float]:
    durations = []
    for _ in range(count):
        started = time.perf_counter()
        engine.step()
        durations.append((time.perf_counter() - started) * 1000)
        while inbox.poll(0):
            inbox.recv()
    return durations


# ------------------------------------------------------------ the run


def main() -> int:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=24, help="prompts of each kind")
    parser.add_argument("--parts", nargs="+", choices=("master", "engine"), default=["master", "engine"])
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    cores = Cores.shared(1)
    settle_memory()  # as the engine process does
    print("| where | prompt | p50 ms | max ms |\n| --- | --- | --- | --- |")
    for part in args.parts:
        for what in PROMPTS:
            if part == "master":
                found = late_ms(what, args.count, cores)
            elif "characters" not in what:
                found = turns_ms(what, args.count)
            else:
                continue
            row = {"where": part, "prompt": what, "p50_ms": statistics.median(found), "max_ms": max(found)}
            rows.append(row | {"all_ms": [round(one, 3) for one in found]})
            print(f"| {part} | {what} | {row['p50_ms']:.2f} | {row['max_ms']:.2f} |", flush=True)
    if args.out:
        args.out.write_text(json.dumps({**describe_run(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
