"""Crew: threads that wait for the next piece of work, so that a transfer need not start one.

Starting a thread takes the caller, which launches steps, a tenth of a millisecond; waking one a hundredth.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

IDLE_LIMIT_S = 60.0


class Crew:
    """As many threads as there is work at a time; any thread may give some."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()
        self._news = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._num_idle = 0
        self._is_closed = False

    def do(self, work: Callable[[], None]) -> None:
        """Run this at once, in a thread of its own until it returns; nothing happens once closed."""
        with self._news:
            if self._is_closed:
                return
            self._work.append(work)
            if self._num_idle >= len(self._work):
                self._news.notify()
                return
            thread = threading.Thread(target=self._run, name="kv-crew", daemon=True)
            self._threads.add(thread)
        thread.start()

    def close(self, until_s: float) -> None:
        """Take no more work, and wait for what runs until that monotonic time."""
        with self._news:
            self._is_closed = True
            threads = list(self._threads)
            self._news.notify_all()
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    def _run(self) -> None:
        while (work := self._next()) is not None:
            work()

    def _next(self) -> Callable[[], None] | None:
        with self._news:
            self._num_idle += 1
            self._news.wait_for(lambda: self._work or self._is_closed, IDLE_LIMIT_S)
            self._num_idle -= 1
            if self._work:
                return self._work.popleft()
            self._threads.discard(threading.current_thread())
            return None
