"""A prefill or decode node without a model, as a process of its own: `python tests/pd/fake_node.py JSON`.

Links, agent and engine client are the real ones; the engine behind them computes each token as a function of
the prompt and the position, so that every test knows what must come out. KV is one TCP message with the
ticket and the first token.
"""

import asyncio
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec

from lightllm.cluster_link import new_epoch
from lightllm.engine.link import ZmqLink
from lightllm.frontend.engine_client import EngineClient
from lightllm.frontend.node_agent import NodeAgent
from lightllm.messages import (
    AbortAll,
    AbortRequest,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    EngineUp,
    Inspect,
    Inspected,
    KVLayout,
    KVReserved,
    Ping,
    Pong,
    RenewLeases,
    RequestFailure,
    RequestOutput,
    RequestView,
    TokenLogprobs,
)

LAYOUT = KVLayout(
    model_hash="m" * 64,
    tokenizer_hash="t" * 64,
    vocab_size=257,
    num_layers=1,
    num_kv_heads=1,
    head_dim=8,
    dtype="float32",
    kv_dtype="float32",
    tp_size=1,
)


class NodeOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the node behaves; times in seconds.

    `num_transfers`: so many succeed, the rest fails. `is_deaf`: its engine answers no questions.
    `reserve_s`: so long it takes to find slots. `num_hidden_slots`: in use by nobody knows whom.
    """

    role: str
    name: str
    masters: list[tuple[str, int]]
    token: str = "a token of tests, long enough"
    num_slots: int = 4096
    max_req_total_len: int = 512
    prefill_s: float = 0.0
    reserve_s: float = 0.0
    num_hidden_slots: int = 0
    step_s: float = 0.002
    lease_s: float = 30.0
    full_after_s: float = 0.2
    drain_s: float = 5.0
    num_transfers: int = 10**9
    dtype: str = "float32"
    is_deaf: bool = False


def token_of(prompt: list[int], position: int) -> int:
    """The output token at an index; printable, so that texts are easy to read."""
    return 97 + (sum(prompt) * 7 + position * 11 + position // 26) % 26


class Work:
    """One request of the fake engine."""

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.output = list(request.output_token_ids)
        self.ready_s = time.monotonic()
        self.leased_s = self.ready_s
        self.phase = "running" if request.recv_kv_from is None else "reserving"
        self.num_slots = len(request.prompt_token_ids) + request.sampling_params.max_new_tokens
        self.kv_sent: queue.Queue[str] | None = None
        self.is_first = True


class FakeEngine:
    """Speaks ToEngine and FromEngine over the ordinary link."""

    def __init__(self, options: NodeOptions, link: ZmqLink) -> None:
        self.options = options
        self.link = link
        self.work: dict[str, Work] = {}
        self.arrived: queue.Queue[tuple[str, int]] = queue.Queue()
        self.early: dict[str, int] = {}
        self.steps = 0
        self.generated = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._listen, daemon=True).start()

    def run(self) -> None:
        """Serve for ever."""
        while True:
            for message in self.link.receive(self.options.step_s):
                self._take(message)
            outputs = [output for work in list(self.work.values()) for output in self._advance(work)]
            while not self.arrived.empty():
                ticket, first = self.arrived.get()
                self.early[ticket] = first
            self.steps += 1
            if outputs or not self.steps % 100:
                self.generated += sum(len(output.new_token_ids) for output in outputs)
                self.link.send(EngineOutput(outputs=outputs, stats=self.stats()))
            time.sleep(self.options.step_s)

    def stats(self) -> EngineStats:
        return EngineStats(
            requests_running=len(self.work),
            kv_used_tokens=self.used(),
            kv_total_tokens=self.options.num_slots,
            steps_total=self.steps,
            generated_tokens_total=self.generated,
        )

    def used(self) -> int:
        return sum(work.num_slots for work in self.work.values() if work.phase != "reserving")

    def _take(self, message: object) -> None:
        match message:
            case EngineRequest() as request:
                self.work[request.request_id] = Work(request)
                self.work[request.request_id].ready_s += self.options.prefill_s
            case AbortRequest(request_id=request_id):
                self.work.pop(request_id, None)
            case AbortAll():
                self.work.clear()
            case RenewLeases(request_ids=request_ids):
                for request_id in request_ids:
                    if request_id in self.work:
                        self.work[request_id].leased_s = time.monotonic()
            case Inspect(nonce=nonce, request_ids=request_ids) if not self.options.is_deaf:
                views = [
                    RequestView(
                        request_id=name,
                        state=work.phase,
                        num_kv_tokens=work.num_slots,
                        events=[("queued", work.request.arrival_s)],
                    )
                    for name, work in self.work.items()
                    if name in request_ids
                ]
                self.link.send(Inspected(nonce=nonce, views=views))
            case Ping(nonce=nonce):
                self.link.send(Pong(nonce=nonce, stats=self.stats()))

    def _advance(self, work: Work) -> list[RequestOutput]:
        now = time.monotonic()
        request = work.request
        is_transfer = request.recv_kv_from is not None or request.send_kv_to is not None
        if is_transfer and now - work.leased_s > self.options.lease_s:
            return [self._failed(work, "lease_expired")]
        if work.phase == "reserving":
            waited_s = now - work.ready_s + self.options.prefill_s
            num_free = self.options.num_slots - self.options.num_hidden_slots - self.used()
            if waited_s >= self.options.reserve_s and work.num_slots <= num_free:
                work.phase = "receiving"
                self.link.send(KVReserved(request_id=request.request_id, num_cached_tokens=0))
            elif waited_s > self.options.full_after_s + 2 * self.options.prefill_s:
                return [self._failed(work, "kv_full")]
            return []
        if work.phase == "receiving":
            assert request.recv_kv_from is not None
            first = self.early.pop(request.recv_kv_from.ticket, None)
            if first is not None:
                work.output.append(first)
                work.phase, work.is_first = "running", False
            return []
        if work.phase == "sending":
            return self._sent(work)
        return self._compute(work) if now >= work.ready_s else []

    def _compute(self, work: Work) -> list[RequestOutput]:
        request, params = work.request, work.request.sampling_params
        token = token_of(request.prompt_token_ids, len(work.output))
        work.output.append(token)
        is_last = len(work.output) >= params.max_new_tokens
        if is_last:
            del self.work[request.request_id]
        elif request.send_kv_to is not None:
            work.phase = "sending"
            work.kv_sent = queue.Queue()
            threading.Thread(target=self._ship, args=(work, token), daemon=True).start()
        entry = TokenLogprobs(logprob=-0.5, top_ids=[token], top_logprobs=[-0.5])
        scored = [None, *[entry] * (len(request.prompt_token_ids) - 1)]
        output = RequestOutput(
            request_id=request.request_id,
            new_token_ids=[token],
            logprobs=None if params.logprobs is None else [entry],
            prompt_logprobs=scored if params.prompt_logprobs is not None and work.is_first else None,
            finish_reason="length" if is_last else None,
        )
        work.is_first = False
        return [output]

    def _ship(self, work: Work, token: int) -> None:
        target = work.request.send_kv_to
        assert target is not None
        assert work.kv_sent is not None
        host, _, port = target.address.rpartition(":")
        try:
            self.options.num_transfers -= 1
            if self.options.num_transfers < 0:
                raise ConnectionError("told to fail")
            with socket.create_connection((host, int(port)), timeout=2) as peer:
                peer.sendall(msgspec.msgpack.encode((target.ticket, token)))
                peer.shutdown(socket.SHUT_WR)
                work.kv_sent.put("" if peer.recv(2) == b"ok" else "no ack")
        except OSError as error:
            work.kv_sent.put(str(error))

    def _sent(self, work: Work) -> list[RequestOutput]:
        assert work.kv_sent is not None
        if work.kv_sent.empty():
            return []
        if work.kv_sent.get():
            return [self._failed(work, "kv_transfer_failed")]
        del self.work[work.request.request_id]
        return [RequestOutput(request_id=work.request.request_id, finish_reason="handed_over")]

    def _failed(self, work: Work, code: str) -> RequestOutput:
        self.work.pop(work.request.request_id, None)
        failure = RequestFailure(code=code, message=f"{self.options.name}: {code}")
        return RequestOutput(request_id=work.request.request_id, finish_reason="error", error=failure)

    def _listen(self) -> None:
        while True:
            peer, _ = self.listener.accept()
            with peer:
                data = b"".join(iter(lambda peer=peer: peer.recv(4096), b""))  # type: ignore[misc]
                self.arrived.put(msgspec.msgpack.decode(data, type=tuple[str, int]))
                peer.sendall(b"ok")


async def serve(options: NodeOptions) -> None:
    """Run until SIGTERM, which drains."""
    with tempfile.TemporaryDirectory() as folder:
        addresses = f"ipc://{Path(folder)}/engine", f"ipc://{Path(folder)}/frontend"
        engine = FakeEngine(options, ZmqLink(*addresses))
        client = EngineClient()
        info = EngineInfo(
            device="fake",
            dtype="float32",
            kv_total_tokens=options.num_slots,
            max_req_total_len=options.max_req_total_len,
            vocab_size=257,
            load_s=0.0,
            attention_backend="fake",
            kv_address=f"127.0.0.1:{engine.listener.getsockname()[1]}",
            kv_layout=msgspec.structs.replace(LAYOUT, dtype=options.dtype),
            kv_epoch=new_epoch(),
        )
        client.connect(EngineUp(epoch=1, address=addresses[0], reply_address=addresses[1], info=info))
        threading.Thread(target=engine.run, daemon=True).start()
        agent = NodeAgent(
            client,
            options.token.encode(),
            node_id=options.name,
            epoch=new_epoch(),
            role=options.role,
            address="127.0.0.1:0",
        )
        agent.follow({(host, port) for host, port in options.masters})
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        print("ready", flush=True)
        await stopped.wait()
        agent.drain()
        end = time.monotonic() + options.drain_s
        while agent.num_live and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        agent.leave("stopped")
        await asyncio.sleep(0.1)
        client.close()


if __name__ == "__main__":
    asyncio.run(serve(msgspec.json.decode(sys.argv[1], type=NodeOptions)))
