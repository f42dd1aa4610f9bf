"""What a change of the scheduler would bring on a GPU, without one: the real scheduler, modelled step times.

    python benchmarks/simulate_schedule.py [--load 100,500,1024,128] [--set batch_max_tokens=2048]

A load is clients, requests, prompt tokens, output tokens; `~` before the last number draws it per request
from a normal distribution as wide as its mean, as in docs/performance.md. The clock is simulated:
steps are scheduled one ahead of the device, as the engine does it, and take as long as `StepTimes` says.
Prints one JSON object per load. The defaults are those of Llama-2-7B in bfloat16 on one H100.
"""

import argparse
import heapq
import json
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightllm.messages import EngineRequest, ScheduledBatch, StepOutput
from lightllm.sampling_params import SamplingParams
from lightllm.scheduler.config import SchedulerConfig
from lightllm.scheduler.scheduler import Scheduler

LOADS = ("100,500,1024,~128", "256,768,256,256")
START_S = 1e9  # the scheduler wants Unix time
CLIENT_S = 0.002  # from a client's last token to its next request


class StepTimes(NamedTuple):
    """How long a step takes, in seconds; see results/decode_steps_h100.json and kernels_h100.json.

    Attributes:
        weights_s, row_s: products and elementwise kernels of few rows, which read all weights.
        token_s, base_s: the same of many rows, which compute.
        kv_token_s: attention of a decode, per token of KV that it reads.
        pair_s: attention of a prompt, per pair of a query and a key.
        eager_s: a step that no graph computes takes so much longer.
    """

    weights_s: float = 4.9e-3
    row_s: float = 7.5e-6
    token_s: float = 21.2e-6
    base_s: float = 0.6e-3
    kv_token_s: float = 0.183e-6
    pair_s: float = 4 * 4096 * 32 / 190e12
    eager_s: float = 1.2e-3

    def of(self, batch: ScheduledBatch) -> float:
        """Duration of this step."""
        num_tokens = sum(batch.num_new_tokens)
        duration_s = max(self.weights_s + self.row_s * num_tokens, self.base_s + self.token_s * num_tokens)
        for start, count in zip(batch.starts, batch.num_new_tokens, strict=True):
            if count == 1:
                duration_s += start * self.kv_token_s
            else:
                duration_s += count * (start + count / 2) * self.pair_s
        return duration_s + (self.eager_s if num_tokens > len(batch.rows) else 0.0)


class Load(NamedTuple):
    """A closed loop of clients."""

    num_clients: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    is_drawn: bool

    @classmethod
    def parse(cls, text: str) -> "Load":
        """See the module."""
        clients, requests, prompt, output = text.split(",")
        return cls(int(clients), int(requests), int(prompt), int(output.strip("~")), "~" in output)

    def requests(self) -> Iterator[EngineRequest]:
        """All requests, with tokens that have no prefix in common."""
        draw = random.Random(0)
        for i in range(self.num_requests):
            prompt = [draw.randrange(100, 32_000) for _ in range(self.prompt_tokens)]
            length = self.output_tokens
            if self.is_drawn:
                length = max(2, min(2 * length, round(draw.gauss(length, length))))
            params = SamplingParams(max_new_tokens=length, ignore_eos=True)
            yield EngineRequest(request_id=f"r{i}", prompt_token_ids=prompt, sampling_params=params)


class Simulation:
    """One load on one engine."""

    def __init__(self, load: Load, config: SchedulerConfig, times: StepTimes) -> None:
        self.load, self.times = load, times
        self.scheduler = Scheduler(config, seed=1)
        self.now_s = 0.0
        self.num_done = self.num_tokens = self.num_steps = self.num_prompt_tokens = 0
        self.waited_s: dict[str, float] = {}
        self._requests = load.requests()
        self._arrivals: list[tuple[float, str, EngineRequest]] = []
        self._arrived_s: dict[str, float] = {}
        self._steps: list[tuple[float, ScheduledBatch]] = []
        self._device_free_s = 0.0

    def run(self) -> dict[str, float]:
        """Serve the load to its end."""
        for _ in range(self.load.num_clients):
            self._send_next(0.0)
        while self.num_done < self.load.num_requests:
            self._turn()
        waited_s = sorted(self.waited_s.values())
        return {
            "output_tokens_per_s": round(self.num_tokens / self.now_s, 1),
            "wall_s": round(self.now_s, 2),
            "ttft_p50_s": round(statistics.median(waited_s), 3),
            "ttft_p99_s": round(waited_s[int(0.99 * len(waited_s))], 3),
            "steps": self.num_steps,
            "prompt_tokens_computed": self.num_prompt_tokens,
            "preemptions": self.scheduler.stats().preemptions_total,
        }

    def _turn(self) -> None:
        """One turn of the engine's loop; the clock moves on where the engine would wait."""
        while self._arrivals and self._arrivals[0][0] <= self.now_s:
            self.scheduler.add(heapq.heappop(self._arrivals)[2], START_S + self.now_s)
        batch = self.scheduler.schedule(START_S + self.now_s)
        if batch is not None:
            self._device_free_s = max(self._device_free_s, self.now_s) + self.times.of(batch)
            self._steps.append((self._device_free_s, batch))
            self.num_steps += 1
            self.num_prompt_tokens += sum(count for count in batch.num_new_tokens if count > 1)
        if len(self._steps) > (batch is not None):
            self._take_result(*self._steps.pop(0))
        elif batch is None:
            self.now_s = max(self.now_s, self._arrivals[0][0])

    def _take_result(self, done_s: float, batch: ScheduledBatch) -> None:
        self.now_s = max(self.now_s, done_s)
        token_ids = [[7] if is_sampling else [] for is_sampling in batch.is_sampling]
        for output in self.scheduler.update(StepOutput(step_id=batch.step_id, token_ids=token_ids)):
            self.num_tokens += len(output.new_token_ids)
            self.waited_s.setdefault(output.request_id, self.now_s - self._arrived_s[output.request_id])
            if output.finish_reason is not None:
                self.num_done += 1
                self._send_next(self.now_s + CLIENT_S)

    def _send_next(self, at_s: float) -> None:
        request = next(self._requests, None)
        if request is not None:
            self._arrived_s[request.request_id] = at_s
            heapq.heappush(self._arrivals, (at_s, request.request_id, request))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--load", action="append", help="clients,requests,prompt,output")
    parser.add_argument("--num_slots", type=int, default=115_850, help="KV capacity in tokens")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=NUMBER", help="of SchedulerConfig"
    )
    args = parser.parse_args()
    fields = {
        "max_running": 1000,
        "batch_max_tokens": 4096,
        "chunked_prefill_size": 4096,
        "max_req_total_len": 4096,
        **{name: int(value) for name, value in (text.split("=") for text in args.set)},
    }
    config = SchedulerConfig(num_slots=args.num_slots, **fields)
    for text in args.load or LOADS:
        found = Simulation(Load.parse(text), config, StepTimes()).run()
        print(json.dumps({"load": text, **found}), flush=True)


if __name__ == "__main__":
    main()
