"""The one throughput line while the engine is busy. Runs in the engine process; knows nothing but numbers."""

import logging
import time
from collections.abc import Callable

from lightllm.messages import EngineStats

logger = logging.getLogger(__name__)


class StatsLog:
    """Logs what has been done since its last line, once per interval in which there were steps.

    Args:
        interval_s: seconds between two lines.
        clock: monotonic seconds.
    """

    def __init__(self, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._start = self._last = EngineStats()
        self._start_s = self._last_s = clock()

    def note(self, stats: EngineStats) -> None:
        """Take the state after a step; an idle time before it is no part of any line."""
        now_s = self._clock()
        if now_s - self._last_s > self._interval_s:
            self._start, self._start_s = self._last, now_s
        elif now_s - self._start_s >= self._interval_s:
            self._log(stats, now_s - self._start_s)
            self._start, self._start_s = stats, now_s
        self._last, self._last_s = stats, now_s

    def _log(self, stats: EngineStats, span_s: float) -> None:
        prompt = stats.prompt_tokens_total - self._start.prompt_tokens_total
        cached = stats.cached_tokens_total - self._start.cached_tokens_total
        generated = stats.generated_tokens_total - self._start.generated_tokens_total
        steps = stats.steps_total - self._start.steps_total
        logger.info(
            "prompt %.1f tok/s (%.0f %% cached), output %.1f tok/s, %.1f steps/s; "
            "%d running, %d waiting; KV %d of %d tokens",
            prompt / span_s,
            100 * cached / prompt if prompt else 0,
            generated / span_s,
            steps / span_s,
            stats.requests_running,
            stats.requests_waiting,
            stats.kv_used_tokens,
            stats.kv_total_tokens,
        )
