"""A child process's ends of the two pipes that join it to its supervisor.

Frames (4 bytes little-endian length, then one msgpack message) come in on stdin and go out on what was
stdout; stdout itself is redirected to stderr, so that a library that prints cannot damage a frame. When stdin
ends, the parent is gone and so is the child's reason to live.
"""

import contextlib
import gc
import logging
import os
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from lightllm import messages
from lightllm.messages import ChildConfig, FromChild, ToChild

LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 16 * 1024 * 1024
GC_THRESHOLD = 20_000
"""So many more containers than at the last collection start one; Python's own limit is 700."""


def frame(message: ToChild | FromChild) -> bytes:
    """Put a message's length in front of it."""
    data = messages.encode(message)
    return LENGTH.pack(len(data)) + data


def read_frame(fd: int, kind: Any = ToChild) -> Any:
    """Read one frame with a message of that type; None at the end of the stream. Blocks."""
    head = _read_exactly(fd, LENGTH.size)
    if head is None:
        return None
    (length,) = LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes from the supervisor; the limit is {MAX_FRAME_BYTES}")
    data = _read_exactly(fd, length)
    return None if data is None else messages.decode(data, kind)


def _read_exactly(fd: int, size: int) -> bytes | None:
    # os.read rather than sys.stdin: a thread blocked in a buffered stdin cannot be left behind at exit.
    data = b""
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        if not piece:
            return None
        data += piece
    return data


class Parent:
    """The supervisor, as its child sees it."""

    def __init__(self) -> None:
        gc.set_threshold(GC_THRESHOLD)  # before all imports of weight: modules are no garbage
        self._status_fd = os.dup(1)
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def read_config(self) -> ChildConfig:
        """The first frame; exits quietly when the parent has already gone."""
        message = read_frame(0)
        if not isinstance(message, ChildConfig):
            raise SystemExit(1)
        return message

    def send(self, message: FromChild) -> None:
        """Report to the supervisor; a supervisor that is gone is not an error here."""
        data = frame(message)
        with self._lock:
            try:
                while data:
                    data = data[os.write(self._status_fd, data) :]
            except BrokenPipeError:
                pass

    def watch(self, on_message: Callable[[ToChild], None], on_gone: Callable[[], None]) -> None:
        """Hand every further frame to `on_message`, in a thread of its own; `on_gone` at the end of stdin."""

        def read() -> None:
            while (message := read_frame(0)) is not None:
                on_message(message)
            on_gone()

        threading.Thread(target=read, name="parent", daemon=True).start()


def settle_memory() -> None:
    """Call once all is there that lives as long as the process: garbage collection then leaves it alone.

    A step makes a few lists per request. They are freed by their counts, but they would have the collector
    run in every step, and at times go through all loaded modules: a stop of tens of milliseconds.
    """
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def leave(code: int) -> NoReturn:
    """End this process, all of whose resources have been closed, without the interpreter's own end.

    That would take all modules apart one by one; with torch's it is longer than half a second.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a log on a full disk is no failure of what has ended well
            stream.flush()
    os._exit(code)
