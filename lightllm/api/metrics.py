"""What `/metrics` shows: plain counters, kept without locks on the event loop, rendered when asked.

Names are the published ones to the letter (counters without `_total` included), so the text is written here
instead of by prometheus_client, which would rename them. Runs in the frontend process.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector

from lightllm.api.process_memory import resident_bytes
from lightllm.frontend.engine_client import EngineClientLike
from lightllm.frontend.generation import Generation
from lightllm.messages import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
    1800.0,
)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
TOKENS = tuple(float(2**i) for i in range(19))
SIZES = tuple(float(2**i) for i in range(13))


class Histogram:
    """Counts per bucket and a sum; `observe` costs one bisection."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add_samples(self, metric: Metric, labels: dict[str, str]) -> None:
        """Append buckets, count and sum to a metric."""
        seen = 0
        for bound, count in zip([*self.bounds, float("inf")], self.counts, strict=True):
            seen += count
            metric.add_sample(f"{metric.name}_bucket", {**labels, "le": _number(bound)}, seen)
        metric.add_sample(f"{metric.name}_count", labels, seen)
        metric.add_sample(f"{metric.name}_sum", labels, self.total)


class Metrics:
    """All figures of this frontend; the `Observer` of its generator and a collector of its registry.

    Args:
        model: the label of every sample.
        version: of the package.
        engine: read for its state whenever the figures are asked for.
    """

    def __init__(self, model: str, version: str, engine: EngineClientLike) -> None:
        self.model = model
        self.version = version
        self.engine = engine
        self.requests: Counter[str] = Counter()
        self.successes = 0
        self.failures: Counter[tuple[str, str]] = Counter()
        self.finishes: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.cached_tokens = 0
        self.seconds = {
            "request_first_token_duration": Histogram(SECONDS),
            "request_inter_token_duration": Histogram(GAP_SECONDS),
            "request_duration": Histogram(SECONDS),
            "request_queue_duration": Histogram(SECONDS),
        }
        self.tokens = {
            "request_input_length": Histogram(TOKENS),
            "request_generated_tokens": Histogram(TOKENS),
        }
        self.step_seconds: dict[str, Histogram] = {}
        self.step_sizes: dict[str, Histogram] = {}
        self.inter_token = self.seconds["request_inter_token_duration"].observe
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    # ------------------------------------------------------------ what is counted

    def first_token(self, generation: Generation) -> None:
        """The first output of a generation has come."""
        self.seconds["request_first_token_duration"].observe(generation.first_s - generation.arrival_s)
        self.seconds["request_queue_duration"].observe(generation.queue_s)

    def finished(self, generation: Generation) -> None:
        """A generation has ended, in whatever way."""
        self.seconds["request_duration"].observe(generation.end_s - generation.arrival_s)
        if generation.first_s:
            self.prompt_tokens += generation.num_prompt_tokens
            self.cached_tokens += generation.num_cached_tokens
        for prompt in generation.prompts:
            self.tokens["request_input_length"].observe(len(prompt))
        for sample in generation.samples:
            self.tokens["request_generated_tokens"].observe(sample.num_tokens)
            self.finishes[sample.finish_reason or "error"] += 1

    def step(self, stats: EngineStats) -> None:
        """The engine has reported a step."""
        phase = stats.step_phase
        if phase not in self.step_seconds:
            self.step_seconds[phase] = Histogram(SECONDS)
            self.step_sizes[phase] = Histogram(SIZES)
        self.step_seconds[phase].observe(stats.step_duration_s)
        self.step_sizes[phase].observe(stats.step_batch_size)

    def answered(self, route: str, status: int, code: str) -> None:
        """A request to a counted route is over; `code` is empty when all went well."""
        self.requests[route] += 1
        if code:
            self.failures[str(status), code] += 1
        else:
            self.successes += 1

    # ------------------------------------------------------------ what is shown

    def render(self) -> bytes:
        """Everything in the Prometheus text format 0.0.4."""
        return exposition(self.registry.collect())

    def collect(self) -> Iterator[Metric]:
        """The families of this collector; called by the registry."""
        label = {"model": self.model}
        yield from self._counters(label)
        yield from self._gauges(label)
        for name, histogram in [*self.seconds.items(), *self.tokens.items()]:
            metric = Metric(f"lightllm_{name}", name.replace("_", " "), "histogram")
            histogram.add_samples(metric, label)
            yield metric
        for name, by_phase in (("step_duration", self.step_seconds), ("batch_size", self.step_sizes)):
            metric = Metric(f"lightllm_{name}", f"{name.replace('_', ' ')} by phase", "histogram")
            for phase, histogram in by_phase.items():
                histogram.add_samples(metric, {**label, "phase": phase})
            yield metric

    def _counters(self, label: dict[str, str]) -> Iterator[Metric]:
        stats = self.engine.stats
        routes = [({"route": route}, count) for route, count in self.requests.items()]
        failures = [({"status": s, "code": c}, count) for (s, c), count in self.failures.items()]
        finishes = [({"reason": reason}, count) for reason, count in self.finishes.items()]
        yield labelled("request_count", "requests by route", "counter", label, routes)
        yield labelled("request_success", "requests answered", "counter", label, [({}, self.successes)])
        yield labelled("request_failure", "requests by status and error code", "counter", label, failures)
        yield labelled("request_finish", "samples by finish_reason", "counter", label, finishes)
        plain = {
            "prompt_tokens_total": self.prompt_tokens,
            "generated_tokens_total": self.generated_tokens,
            "cached_tokens_total": self.cached_tokens,
            "preemptions_total": stats.preemptions_total,
            "engine_restarts_total": self.engine.restarts_total,
        }
        for name, value in plain.items():
            yield labelled(name, name.replace("_", " "), "counter", label, [({}, max(0, value))])

    def _gauges(self, label: dict[str, str]) -> Iterator[Metric]:
        stats = self.engine.stats
        hit_rate = self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        is_up = self.engine.info is not None
        gauges: dict[str, float] = {
            "requests_running": stats.requests_running if is_up else 0,
            "requests_waiting": stats.requests_waiting if is_up else 0,
            "kv_used_tokens": stats.kv_used_tokens if is_up else 0,
            "kv_total_tokens": stats.kv_total_tokens if is_up else 0,
            "prefix_cache_hit_rate": hit_rate,
            "node_up": float(is_up),
        }
        for name, value in gauges.items():
            yield labelled(name, name.replace("_", " "), "gauge", label, [({}, value)])
        memory = [({"process": process}, size) for process, size in resident_bytes().items()]
        yield labelled(
            "resident_memory_bytes", "resident memory of the node's processes", "gauge", label, memory
        )
        yield labelled("build_info", "version of lightllm", "gauge", label, [({"version": self.version}, 1)])


def labelled(
    name: str, text: str, kind: str, label: dict[str, str], samples: Iterable[tuple[dict[str, str], float]]
) -> Metric:
    """A family `lightllm_<name>` of samples, each with its own labels and the common ones."""
    metric = Metric(f"lightllm_{name}", text, kind)
    for labels, value in samples:
        metric.add_sample(metric.name, {**label, **labels}, value)
    return metric


def exposition(families: Iterable[Metric]) -> bytes:
    """Write metric families as text, under exactly the names of their samples."""
    lines: list[str] = []
    for family in families:
        names = {sample.name for sample in family.samples}
        # Families of prometheus_client keep a counter's name without the suffix that its samples have.
        name = f"{family.name}_total" if names == {f"{family.name}_total"} else family.name
        lines.append(f"# HELP {name} {family.documentation}")
        lines.append(f"# TYPE {name} {family.type}")
        for sample in family.samples:
            labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in sample.labels.items())
            braces = f"{{{labels}}}" if labels else ""
            lines.append(f"{sample.name}{braces} {_number(sample.value)}")
    return ("\n".join(lines) + "\n").encode()


def _number(value: float) -> str:
    return "+Inf" if value == float("inf") else repr(value)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
