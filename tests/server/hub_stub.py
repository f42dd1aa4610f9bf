"""A hub on loopback: enough of its API to list and download the files of one model."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(NamedTuple):
    url: str
    asked: list[str]
    """`METHOD path` of each request, in order."""


@contextmanager
def hub(model_id: str, files: Mapping[str, bytes], fault: str = "") -> Iterator[Hub]:
    """Serve a model.

    Args:
        fault: what happens to weights: "cut" ends the connection in mid-file, "gated" answers 401.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, form: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            asked.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0]
            name = path.removeprefix(f"/{model_id}/resolve/{COMMIT}/")
            if path.startswith(f"/api/models/{model_id}/tree/"):
                listing = [
                    {"type": "file", "path": f, "size": len(b), "oid": oid(b)} for f, b in files.items()
                ]
                self.reply(200, json.dumps(listing).encode(), with_body)
            elif path.startswith(f"/api/models/{model_id}"):
                siblings = [{"rfilename": file} for file in files]
                info = {"id": model_id, "sha": COMMIT, "siblings": siblings}
                self.reply(200, json.dumps(info).encode(), with_body)
            elif name not in files:
                self.reply(404, b"{}", with_body)
            elif fault == "gated" and name.endswith(".safetensors"):
                self.reply(401, b"{}", with_body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            else:
                self.reply(200, files[name], with_body, {"ETag": f'"{oid(files[name])}"'})

        def reply(
            self, status: int, body: bytes, with_body: bool, headers: Mapping[str, str] | None = None
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("X-Repo-Commit", COMMIT)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if fault == "cut" and with_body and self.path.endswith(".safetensors"):
                body = body[: len(body) // 2]
                self.close_connection = True
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_address[1]}", asked)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
