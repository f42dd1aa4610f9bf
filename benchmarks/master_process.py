"""A pd_master as a process of its own, for benchmarks: all that a frontend has, and no model folder.

    python benchmarks/master_process.py --fd LISTENING_SOCKET --core CORE [--config_server HOST:PORT]
    [--vocab_size 257]

Router, node links, Generator, Detokenizer, metrics, routes, uvicorn and uvloop are those of the server; the
tokenizer is that of the tests, one id for each byte. With a config_server it has itself listed there. Bound
to one core; ends with its stdin.
"""

import argparse
import os
import socket
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import uvicorn
import uvloop
from fake_nodes import TOKEN, split

from lightllm.api.app import create_app
from lightllm.api.call import AppContext
from lightllm.api.metrics import Metrics
from lightllm.api.nodes import web_sockets
from lightllm.api.protocol import uvicorn_config
from lightllm.api.request_log import RequestLog
from lightllm.config import Config
from lightllm.frontend.directory_client import MasterEntryLink
from lightllm.frontend.generator import Generator
from lightllm.frontend.node_server import NodeServer
from lightllm.frontend.pd_router import PDRouter
from lightllm.server.child import settle_memory
from tests.fakes import byte_tokenizer

MODEL = "bench"


async def serve(listener: socket.socket, config_server: str | None, vocab_size: int) -> None:
    """Serve until stdin ends."""
    port = listener.getsockname()[1]
    node_id = f"pd_master-127.0.0.1:{port}"
    router = PDRouter(vocab_size=vocab_size, max_queued_requests=1024)
    nodes = NodeServer(router, TOKEN, node_id=node_id, epoch=1)
    metrics = Metrics(MODEL, "0", router)
    tokenizer = byte_tokenizer()
    context = AppContext(
        config=Config(),
        tokenizer=tokenizer,
        engine=router,
        generator=Generator(tokenizer, router, request_timeout_s=600, observer=metrics),
        metrics=metrics,
        model_names=[MODEL],
        requests=RequestLog(10),
        version="0",
        cluster=nodes,
    )
    server = uvicorn.Server(uvicorn_config(create_app(context), version="0", web_sockets=web_sockets(nodes)))

    def wait_for_end() -> None:
        sys.stdin.read()
        server.should_exit = server.force_exit = True

    threading.Thread(target=wait_for_end, daemon=True).start()
    router.start()
    entry = None
    if config_server is not None:
        entry = MasterEntryLink(*split(config_server), TOKEN, node_id, 1, advertised=("127.0.0.1", port))
    settle_memory()
    await server.serve(sockets=[listener])
    if entry is not None:
        entry.stop()


def main() -> int:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fd", type=int, required=True, help="of an inherited listening socket")
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--config_server", help="HOST:PORT")
    parser.add_argument("--vocab_size", type=int, default=257, help="ids that prompts may have")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})  # before there is any thread
    uvloop.run(serve(socket.socket(fileno=args.fd), args.config_server, args.vocab_size))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
