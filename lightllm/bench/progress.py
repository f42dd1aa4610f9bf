"""How far a run is, on stderr: a bar on a terminal, else a line per five seconds. Knows three numbers."""

import sys
import time
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_INTERVAL_S = 5.0


class ProgressView(Protocol):
    """Shows progress between `with` and its end."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def update(self, num_done: int, num_failed: int, num_tokens: int) -> None:
        """Take the latest numbers; cheap enough to call for every token."""
        ...


def progress_view(
    title: str, total: int, *, unit: str = "token/s", stream: TextIO | None = None
) -> ProgressView:
    """The view that fits `stream` (stderr): a bar on a terminal, else lines."""
    stream = stream or sys.stderr
    kind = _BarView if stream.isatty() else _LineView
    return kind(title, total, unit, stream)


class _BarView:
    """A rich bar; rich redraws it from its own thread."""

    def __init__(self, title: str, total: int, unit: str, stream: TextIO) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=Console(file=stream),
        )
        self._task = self._bar.add_task(title, total=total, note="")
        self._unit = unit
        self._start = self._shown_at = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def update(self, num_done: int, num_failed: int, num_tokens: int) -> None:
        now = time.monotonic()
        if now - self._shown_at < 0.1 and num_done != self._bar.tasks[0].total:
            return
        self._shown_at = now
        note = _note(num_failed, num_tokens, now - self._start, self._unit)
        self._bar.update(self._task, completed=num_done, note=note)


class _LineView:
    """One line per interval, and none for a run that is shorter."""

    def __init__(self, title: str, total: int, unit: str, stream: TextIO) -> None:
        self._title, self._total, self._unit, self._stream = title, total, unit, stream
        self._start = self._shown_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def update(self, num_done: int, num_failed: int, num_tokens: int) -> None:
        now = time.monotonic()
        if now - self._shown_at < LINE_INTERVAL_S:
            return
        self._shown_at = now
        note = _note(num_failed, num_tokens, now - self._start, self._unit)
        print(f"{self._title}: {num_done}/{self._total} {note}".rstrip(), file=self._stream, flush=True)


def _note(num_failed: int, num_tokens: int, elapsed_s: float, unit: str) -> str:
    if not unit:
        return ""
    return f"{num_failed} failed, {num_tokens / max(elapsed_s, 1e-9):.1f} {unit}"
