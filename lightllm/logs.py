"""Log set-up of every process: one event a line on stderr, as text or JSON, control characters escaped.

L0, standard library only. Modules log through `logging.getLogger(__name__)` and know nothing of formats.
Prompts and secrets are never passed to a logger; this module does not filter.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TextIO

LEVELS: Mapping[str, int] = MappingProxyType(
    {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
)


def setup_logging(log_format: str, level: str, process_name: str, stream: TextIO | None = None) -> None:
    """Make the root logger write to stderr; a second call replaces the first.

    Args:
        log_format: `text` or `json`.
        level: `debug`, `info`, `warning` or `error`.
        process_name: what this process is: server, engine, frontend, worker.
        stream: instead of stderr, for tests.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process_name) if log_format == "json" else TextFormatter(process_name))
    logging.basicConfig(handlers=[handler], level=LEVELS[level], force=True)
    logging.captureWarnings(True)


def escape(text: str) -> str:
    """Write everything that is not printable as a backslash escape, so that an event stays one line."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


class TextFormatter(logging.Formatter):
    """`2026-11-22 12:00:00.123 INFO engine lightllm.engine.core: message`, times local."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self.process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        """Lay one record out as one line."""
        seconds = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        text = escape("\n".join(part for part in (record.getMessage(), _exception(record)) if part))
        return (
            f"{seconds}.{int(record.msecs):03d} {record.levelname} {self.process_name} {record.name}: {text}"
        )


class JsonFormatter(logging.Formatter):
    """One JSON object with time (Unix seconds), level, process, logger, message and perhaps exception."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self.process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        """Lay one record out as one line."""
        event: dict[str, str | float] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self.process_name,
            "logger": record.name,
            "message": record.getMessage(),
        }
        exception = _exception(record)
        if exception:
            event["exception"] = exception
        # ASCII output escapes control characters and lone surrogates alike.
        return json.dumps(event, separators=(",", ":"))


def _exception(record: logging.LogRecord) -> str:
    """Return the traceback and stack of a record, or nothing."""
    parts = [logging.Formatter().formatException(record.exc_info)] if record.exc_info else []
    return "\n".join([*parts, record.stack_info] if record.stack_info else parts)
