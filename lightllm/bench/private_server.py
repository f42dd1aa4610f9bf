"""A server of our own on a free loopback port, for the length of a chat.

Starts it as a subprocess with a random key, so that other users of the machine cannot reach it, reads its
ready line and stops it at the end. Knows the server only by its command line; runs in the client process.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import IO, Self

from lightllm.errors import LightLLMError

READY = re.compile(r"^ready: (\S+) model=(\S+)")
STOP_GRACE_S = 10.0
NUM_KEPT_LINES = 12


class ServerFailed(LightLLMError):
    """The private server ended before it was ready; `exit_code` is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PrivateServer:
    """Runs between `with` and its end.

    Args:
        model: what `--model_dir` accepts; None means the server's default.
        on_progress: told of each line that the server writes while it loads.
        command: how a server is started; its flags are appended.
    """

    def __init__(
        self,
        model: str | None,
        on_progress: Callable[[str], None],
        *,
        command: tuple[str, ...] = (sys.executable, "-m", "lightllm.server.api_server"),
    ) -> None:
        self.url = ""
        self.model = ""
        self.api_key = secrets.token_hex(16)
        self._on_progress = on_progress
        self._lines: deque[str] = deque(maxlen=NUM_KEPT_LINES)
        self._readers: list[threading.Thread] = []
        flags = ["--run_mode", "normal", "--host", "127.0.0.1", "--port", "0"]
        self._command = [*command, *flags, *(["--model_dir", model] if model else [])]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Start the server and wait until it serves.

        Raises:
            ServerFailed: it ended first; the message holds its last lines.
        """
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"LIGHTLLM_API_KEY": self.api_key},
            # Ctrl-C stops an answer of the chat; it must not reach the server.
            start_new_session=True,
        )
        stdout, stderr = self._process.stdout, self._process.stderr
        assert stdout is not None
        assert stderr is not None
        self._read(stderr, self._read_log)
        try:
            is_ready = self._wait_ready(stdout)
        except BaseException:
            self.stop()
            raise
        self._read(stdout, _drain)
        if not is_ready:
            code = self._process.wait()
            self.stop()
            raise ServerFailed(self._last_words() or f"the server ended with code {code}", code or 1)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server; a second signal, then a kill, if it lingers."""
        process = self._process
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                process.send_signal(number)
                try:
                    process.wait(STOP_GRACE_S)
                except subprocess.TimeoutExpired:
                    continue
        for reader in self._readers:
            reader.join(1)

    def _read(self, stream: IO[str], read: Callable[[IO[str]], None]) -> None:
        """Read a pipe to its end in a thread, which closes it."""

        def run() -> None:
            with stream:
                read(stream)

        self._readers.append(threading.Thread(target=run, daemon=True))
        self._readers[-1].start()

    def _last_words(self) -> str:
        """The error with which the server ended, or all its last lines if there is no such line."""
        lines = list(self._lines)
        starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        return "\n".join(lines[starts[-1] :]).removeprefix("error: ") if starts else "\n".join(lines)

    def _wait_ready(self, stdout: IO[str]) -> bool:
        for line in stdout:
            match = READY.match(line)
            if match:
                self.url, self.model = match.groups()
                return True
        return False

    def _read_log(self, stderr: IO[str]) -> None:
        for line in stderr:
            self._lines.append(line.rstrip())
            if not self.url:
                self._on_progress(line.strip())


def _drain(stream: IO[str]) -> None:
    """Keep a pipe from filling up."""
    for _ in stream:
        pass
