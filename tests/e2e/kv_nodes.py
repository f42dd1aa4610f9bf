"""Real engine processes with KV links, driven over their message link as the frontend of a node does."""

import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections import defaultdict

import msgspec
import zmq

from lightllm import messages
from lightllm.config import Config, encode_config
from lightllm.messages import (
    ChildConfig,
    ChildFailed,
    ChildReady,
    EngineOutput,
    EngineRequest,
    FromChild,
    FromEngine,
    KVReserved,
    KVSource,
    KVTarget,
    Pong,
    RenewLeases,
)
from lightllm.server.child import LENGTH, frame

RENEW_S = 5.0  # as often as a pd_master, about
TOKEN = "0123456789abcdef0123456789abcdef"


def node_config(name, transport="auto", *, model_dir="smollm2-135m", kv_tokens=6000):
    """A resolved configuration of a node on this machine, with one thread; its name begins with its role."""
    config = Config()
    replace = msgspec.structs.replace
    return replace(
        config,
        model=replace(config.model, model_dir=model_dir, dtype="float32"),
        server=replace(config.server, run_mode=name.split("-")[0]),
        engine=replace(
            config.engine,
            device="cpu",
            max_total_token_num=kv_tokens,
            max_req_total_len=2200,
            running_max_req_size=32,
            batch_max_tokens=128,
            chunked_prefill_size=128,
        ),
        pd=replace(config.pd, kv_transport=transport),
        security=replace(config.security, cluster_token=TOKEN),
        environment=replace(config.environment, loadworker=1, omp_num_threads=1),
    )


class EngineNode:
    """One engine process, with more environment. Messages that it sends are collected by a thread.

    Attributes:
        outputs: by request id.
        reserved: request id -> num_cached_tokens.
        num_steps: of its engine so far.
    """

    def __init__(self, config, directory, **environment):
        name = secrets.token_hex(4)
        address, reply = (f"ipc://{directory}/{name}-{way}" for way in ("in", "out"))
        self._context = zmq.Context(io_threads=1)
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(reply)
        self._outbox = self._context.socket(zmq.PUSH)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-m", "lightllm.server.engine_main"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        child = ChildConfig(config=encode_config(config), address=address, reply_address=reply)
        self.process.stdin.write(frame(child))
        self.process.stdin.flush()
        self.info = self._wait_ready()
        self._outbox.connect(address)
        self.outputs = defaultdict(list)
        self.times = defaultdict(list)
        self.reserved = {}
        self.num_steps = 0
        self.pongs = queue.Queue()
        self._news = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _wait_ready(self):
        while True:
            head = self.process.stdout.read(LENGTH.size)
            assert head, "the engine has ended"
            message = messages.decode(self.process.stdout.read(LENGTH.unpack(head)[0]), FromChild)
            assert not isinstance(message, ChildFailed), message.message
            if isinstance(message, ChildReady):
                return message.info

    def _listen(self):
        while not self._is_closing:
            if not self._inbox.poll(20):
                continue
            message = messages.decode(self._inbox.recv(), FromEngine)
            with self._news:
                match message:
                    case EngineOutput(outputs=outputs, stats=stats):
                        self.num_steps = stats.steps_total
                        for output in outputs:
                            self.outputs[output.request_id].append(output)
                            self.times[output.request_id].append(time.monotonic())
                    case KVReserved(request_id=request_id, num_cached_tokens=count):
                        self.reserved[request_id] = count
                    case Pong():
                        self.pongs.put(message.stats)
                self._news.notify_all()

    def send(self, message):
        self._outbox.send(messages.encode(message))

    def wait(self, condition, limit_s=60.0):
        """Wait until `condition()`, which may look at everything collected."""
        with self._news:
            assert self._news.wait_for(condition, limit_s), "nothing came in time"

    def finish(self, request_id, limit_s=60.0):
        """Wait for the last output of a request."""
        assert self.has_ended(request_id, limit_s), "nothing came in time"
        return self.outputs[request_id][-1]

    def has_ended(self, request_id, limit_s):
        """Whether its last output is there before the time is over."""
        outputs = self.outputs[request_id]
        with self._news:
            return self._news.wait_for(lambda: outputs and outputs[-1].finish_reason is not None, limit_s)

    def token_ids(self, request_id):
        return [token for output in self.outputs[request_id] for token in output.new_token_ids]

    def stats(self):
        self.send(messages.Ping(nonce=1))
        return self.pongs.get(timeout=30)

    def close(self):
        self._is_closing = True
        self._thread.join()
        self.process.kill()
        self.process.communicate()
        self._context.destroy(linger=0)


class Pair:
    """A prefill and a decode engine, and what a pd_master would say to them for one request."""

    def __init__(self, prefill, decode):
        self.prefill, self.decode = prefill, decode
        self.num_requests = 0

    def start(self, prompt, params, known=(), **fields):
        """Begin both legs; returns the request's name."""
        self.num_requests += 1
        name = f"r{self.num_requests}"
        leg = {"prompt_token_ids": prompt, "sampling_params": params, "output_token_ids": list(known)}
        source = KVSource(node_id="P", epoch=self.prefill.info.kv_epoch, ticket=f"ticket-{name:>12}")
        self.decode.send(EngineRequest(request_id=f"{name}d", recv_kv_from=source, **leg, **fields))
        self.decode.wait(lambda: f"{name}d" in self.decode.reserved or self.decode.outputs[f"{name}d"])
        target = KVTarget(
            node_id="D",
            epoch=self.decode.info.kv_epoch,
            address=self.decode.info.kv_address,
            ticket=source.ticket,
        )
        self.prefill.send(EngineRequest(request_id=f"{name}p", send_kv_to=target, **leg, **fields))
        return name

    def start_in_transfer(self, prompt, params, num_chunks=3):
        """Begin, and wait until KV of the first chunks leaves, long before the last is computed."""
        num_steps = self.prefill.num_steps
        name = self.start(prompt, params)
        self.prefill.wait(lambda: self.prefill.num_steps >= num_steps + num_chunks)
        return name

    def finish(self, name, limit_s=60.0):
        """All tokens of a request that both legs end well."""
        last = self._last(self.prefill, f"{name}p", limit_s)
        assert last.finish_reason == "handed_over", last
        last = self._last(self.decode, f"{name}d", limit_s)
        assert last.finish_reason in ("stop", "length"), last
        return self.prefill.token_ids(f"{name}p") + self.decode.token_ids(f"{name}d")

    def _last(self, node, request_id, limit_s):
        """Its last output. Leases are renewed meanwhile: a busy machine may need longer than they last."""
        until_s = time.monotonic() + limit_s
        while not node.has_ended(request_id, RENEW_S) and time.monotonic() < until_s:
            for end, leg in ((self.prefill, "p"), (self.decode, "d")):
                end.send(RenewLeases(request_ids=[f"r{n + 1}{leg}" for n in range(self.num_requests)]))
        return node.finish(request_id, 0)

    def run(self, prompt, params, **fields):
        return self.finish(self.start(prompt, params, **fields))
