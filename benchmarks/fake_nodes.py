"""Plays prefill and decode nodes over real links: for benchmarks of what stands in front of nodes.

    python benchmarks/fake_nodes.py --master HOST:PORT | --config_server HOST:PORT --masters 2
    [--streams 256] [--tokens 400] [--step_ms 5] [--decode_nodes 1]

One process. Every node registers at every master over the authenticated WebSocket, grants each reservation,
hands each prompt over, and once all `--streams` prompts are there sends a frame per step and master with a
token for every stream. The steps of several decode nodes are spread evenly over a step's time; the text of
node i is its letter, A for the first, behind an `x` from the prefill node.

Says on stdout: `ready`; `start SECONDS` (monotonic, a little ahead) when the prompts are there; and after the
last step, as JSON by letter, the time at which each step was sent. Ends with its stdin.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightllm import messages
from lightllm.cluster_link import Dialer, Welcome
from lightllm.cluster_messages import (
    REGISTER_PATH,
    REGISTER_PURPOSE,
    NodeRecord,
    NodeReport,
    Registration,
    ToNode,
)
from lightllm.frontend.directory_client import MasterWatch
from lightllm.messages import EngineInfo, EngineOutput, EngineRequest, EngineStats, KVReserved, RequestOutput
from lightllm.node_link import Dialling, Link

TOKEN = b"a-token-for-this-benchmark-only"
LEAD_S = 0.3
KV_TOKENS = 10**8
STATS = EngineStats(kv_total_tokens=KV_TOKENS)


def registration(node_id: str, role: str) -> bytes:
    """Detail of a node's hello."""
    info = EngineInfo(
        device="none",
        dtype="none",
        kv_total_tokens=KV_TOKENS,
        max_req_total_len=10**5,
        vocab_size=257,
        load_s=0,
        attention_backend="none",
    )
    record = NodeRecord(node_id=node_id, epoch=1, role=role, address="none")
    return messages.encode(Registration(record=record, info=info))


class NodeEnd:
    """One node's end of its link to one master.

    Attributes:
        streams: requests that it decodes.
    """

    def __init__(self, cluster: "FakeCluster", node_id: str) -> None:
        self.link: Link | None = None
        self.streams: list[str] = []
        self._cluster = cluster
        self._node_id = node_id
        self._decoder = messages.decoder(ToNode)

    def on_open(self, link: Link, welcome: Welcome | None) -> None:
        self.link = link

    def on_body(self, link: Link, body: bytes) -> None:
        match self._decoder.decode(body):
            case EngineRequest(request_id=request_id, recv_kv_from=source) if source is not None:
                link.send(KVReserved(request_id=request_id, num_cached_tokens=0))
                if request_id.startswith("probe_"):
                    token = RequestOutput(request_id=request_id, new_token_ids=[0], finish_reason="length")
                    link.send(EngineOutput(outputs=[token], stats=STATS))
                else:
                    self.streams.append(request_id)
            case EngineRequest(request_id=request_id, send_kv_to=None):
                # One that ends with its first token, which concerns no decode node.
                token = RequestOutput(request_id=request_id, new_token_ids=[ord("x")], finish_reason="length")
                link.send(EngineOutput(outputs=[token], stats=STATS))
            case EngineRequest(request_id=request_id):
                first = RequestOutput(request_id=request_id, new_token_ids=[ord("x")])
                last = RequestOutput(request_id=request_id, finish_reason="handed_over")
                link.send(EngineOutput(outputs=[first, last], stats=STATS))
                if not request_id.startswith("probe_"):
                    self._cluster.prompt_done()

    def on_closed(self, link: Link, reason: str) -> None:
        self.link = None

    def heartbeat(self, link: Link) -> NodeReport:
        return NodeReport(stats=STATS)

    def dial(self, host: str, port: int) -> Dialling:
        """Keep a link to a master."""
        role = "prefill" if self._node_id == "prefill" else "decode"
        detail = registration(self._node_id, role)

        def dialer() -> Dialer:
            return Dialer(TOKEN, REGISTER_PURPOSE, self._node_id, 1, detail)

        return Dialling(host, port, REGISTER_PATH, self, dialer, "pd_master")

    def send_step(self, token_id: int, *, is_last: bool) -> None:
        """A token for every stream, in one frame."""
        if self.link is None or not self.streams:
            return
        reason = "length" if is_last else None
        outputs = [
            RequestOutput(request_id=i, new_token_ids=[token_id], finish_reason=reason) for i in self.streams
        ]
        self.link.send(EngineOutput(outputs=outputs, stats=STATS))


class FakeCluster:
    """All nodes of this process."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.ends: dict[str, list[NodeEnd]] = {}
        self.all_there = asyncio.Event()
        self._letters = [chr(ord("A") + i) for i in range(args.decode_nodes)]
        self._dialled: set[tuple[str, int]] = set()
        self._num_prompts = 0
        self._kept: list[Any] = []

    def follow(self, masters: set[tuple[str, int]]) -> None:
        """Register every node at each master that is new."""
        for address in masters - self._dialled:
            self._dialled.add(address)
            for name in ("prefill", *self._letters):
                end = NodeEnd(self, name if name == "prefill" else f"decode-{name}")
                self.ends.setdefault(name, []).append(end)
                self._kept.append(end.dial(*address))

    def prompt_done(self) -> None:
        """A prefill node has handed one over."""
        self._num_prompts += 1
        if self._num_prompts == self.args.streams:
            self.all_there.set()

    async def run(self) -> None:
        """From registration to the last step."""
        args = self.args
        if args.config_server:
            host, port = split(args.config_server)
            self._kept.append(MasterWatch(host, port, TOKEN, "fake-nodes", 1, self.follow))
        else:
            self.follow({split(master) for master in args.master})
        num_links = args.masters * (1 + len(self._letters))
        while sum(end.link is not None for ends in self.ends.values() for end in ends) < num_links:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        print("ready", flush=True)
        await self.all_there.wait()
        start_s = time.monotonic() + LEAD_S
        print(f"start {start_s}", flush=True)
        sent = await asyncio.gather(*(self._decode(letter, start_s) for letter in self._letters))
        print(json.dumps(dict(zip(self._letters, sent, strict=True))), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

    async def _decode(self, letter: str, start_s: float) -> list[float]:
        """All steps of one node; the first token of a stream came from the prefill node."""
        step_s = self.args.step_ms / 1000
        next_s = start_s + self._letters.index(letter) * step_s / len(self._letters)
        sent = []
        for step in range(1, self.args.tokens):
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            next_s += step_s
            sent.append(time.monotonic())
            for end in self.ends[letter]:
                end.send_step(ord(letter), is_last=step == self.args.tokens - 1)
        return sent


def split(address: str) -> tuple[str, int]:
    """HOST:PORT."""
    host, _, port = address.rpartition(":")
    return host, int(port)


def main() -> int:
    """Play until stdin ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--master", action="append", default=[], help="HOST:PORT of a pd_master")
    parser.add_argument("--config_server", help="HOST:PORT of one that lists the masters")
    parser.add_argument("--masters", type=int, default=1, help="how many there will be")
    parser.add_argument("--streams", type=int, default=256, help="of all masters together")
    parser.add_argument("--tokens", type=int, default=400, help="per stream")
    parser.add_argument("--step_ms", type=float, default=5.0, help="time between two steps of a node")
    parser.add_argument("--decode_nodes", type=int, default=1)
    args = parser.parse_args()
    import uvloop

    async def run() -> None:
        await FakeCluster(args).run()

    uvloop.run(run())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
