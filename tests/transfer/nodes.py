"""Two ends of a KV link for tests, in this process or, run as a program, the sender in one of its own.

python -m tests.transfer.nodes LANE PLACE ADDRESS TARGET_EPOCH     ships half of a request, then waits
python -m tests.transfer.nodes offer NUM_SLOTS                     prints a p2p offer, then waits
"""

import itertools
import os
import sys
import threading
import time
from functools import partial

import msgspec
import numpy as np
import torch

from lightllm.device.base import Moment, PastMoment, make_device
from lightllm.device.device import CpuDevice
from lightllm.device.kv_pool import KVPool
from lightllm.distributed.shares import kv_head_ranges, share_out
from lightllm.messages import KVLayout, KVSource, KVTarget, KVTransferOrder
from lightllm.model_config import ModelConfig
from lightllm.transfer.base import Endings, Limits
from lightllm.transfer.lane import open_lanes
from lightllm.transfer.link import KVLink
from lightllm.transfer.plan import HostRows
from lightllm.transfer.shipment import Node

TOKEN = b"0123456789abcdef" * 2
TICKET = "ticket-0123456789"
SOURCE_EPOCH, TARGET_EPOCH = 71, 72
NUM_SLOTS = 200
BLOCK_BYTES = 4096
# Each launch takes Triton's interpreter many milliseconds; 100 tokens still are more blocks than WINDOW.
BLOCK_BYTES_INTERPRETED = 4 * BLOCK_BYTES
LIMITS = Limits(handshake_s=2.0, silence_s=1.0, alive_s=0.2, ticket_s=0.5)


def model_of(num_heads, num_kv_heads):
    """Heads of 16 in three layers."""
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 16 * num_heads,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "vocab_size": 99,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
        }
    )


MODEL = model_of(4, 2)
LAYOUT = KVLayout(
    model_hash="m",
    tokenizer_hash="t",
    vocab_size=99,
    num_layers=3,
    num_kv_heads=2,
    head_dim=16,
    dtype="float32",
    kv_dtype="float32",
    tp_size=1,
)


class Gate(Moment):
    """A moment that the device reaches when the test says so."""

    def __init__(self):
        self.came = threading.Event()

    def wait(self):
        assert self.came.wait(10)

    def is_past(self):
        return self.came.is_set()


class InterpretedDevice(CpuDevice):
    """A CPU on which one thread at a time runs kernels: Triton's interpreter knows no more."""

    LOCK = threading.Lock()

    def side_queue(self):
        return self.LOCK


def open_rows(pool, place, first_head=0):
    """The rows of a pool on a host, or of one that kernels pack: interpreted, or on a GPU."""
    if place == "host":
        return HostRows(pool, first_head)
    from lightllm.transfer.device_rows import DeviceRows

    return DeviceRows(pool, make_device("cuda") if place == "gpu" else InterpretedDevice(), first_head)


class End:
    """One node: a pool with numbers in it, and its link. Tests may have it in another process (remote.py).

    Args:
        place: host, interpreted or gpu: where the pool is and what packs it.
        block_bytes: of both ends of a transfer; None: as is usual for the place.
        rank, size: one of so many that share the model; its numbers are its heads of those that all have.
    """

    def __init__(
        self,
        lanes=("shm", "tcp"),
        *,
        epoch,
        seed,
        token=TOKEN,
        layout=LAYOUT,
        limits=LIMITS,
        place="host",
        block_bytes=None,
        num_slots=NUM_SLOTS,
        model=MODEL,
        rank=0,
        size=1,
    ):
        heads = kv_head_ranges(model, size)[rank]
        shared = share_out(model, {}, rank, size).config
        self.pool = KVPool(shared, num_slots, torch.float32, "cuda" if place == "gpu" else "cpu")
        block_bytes = block_bytes or (BLOCK_BYTES_INTERPRETED if place == "interpreted" else BLOCK_BYTES)
        torch.manual_seed(seed)
        numbers = torch.randn(
            2, model.num_hidden_layers, num_slots, model.num_key_value_heads, model.head_dim
        )
        self.pool.storage.copy_(numbers[:, :, :, heads.start : heads.stop])
        self.node = Node(
            layout=msgspec.structs.replace(layout, tp_size=size),
            token=token,
            epoch=epoch,
            lanes=open_lanes(lanes, open_rows(self.pool, place, heads.start), block_bytes),
            limits=limits,
            head_ranges=partial(kv_head_ranges, model),
            rank=rank,
        )
        self.link = KVLink(self.node, "127.0.0.1", 0)
        self.endings = Endings([], [], [], [])
        self.gates = []

    def address(self):
        return self.link.address

    def offer(self, lane="p2p"):
        """What a sender of this lane says to receivers."""
        return self.node.lanes.take_sender(lane, self.node.rows).offer()

    def kv(self, slots):
        """[2, layers, n, heads, head_dim] of these slots."""
        return self.pool.storage[:, :, slots].cpu().numpy()

    def change(self, slots):
        """Write other numbers into these slots, as a step does."""
        self.pool.storage[:, :, slots] += 1
        if self.pool.storage.is_cuda:
            torch.cuda.synchronize()

    def gate(self):
        """Make a gate; its number."""
        self.gates.append(Gate())
        return len(self.gates) - 1

    def open(self, gate):
        """The device has come to this moment."""
        self.gates[gate].came.set()

    def send(self, order, first_token_id=None, gate=None):
        """Send an order behind a gate, and the first token with the last one."""
        self.link.send(order, PastMoment() if gate is None else self.gates[gate])
        if first_token_id is not None:
            self.link.complete(order.request_id, first_token_id)

    def receive(self, order, gate=None):
        self.link.receive(order, PastMoment() if gate is None else self.gates[gate])

    def complete(self, request_id, first_token_id):
        self.link.complete(request_id, first_token_id)

    def cancel(self, *request_ids):
        self.link.cancel(*request_ids)

    def poll(self):
        return self.link.poll()

    def poll_once(self):
        """How many transfers have ended by now."""
        for known, new in zip(self.endings, self.link.poll(), strict=True):
            known += new
        return len(self.endings.transfers)

    def close(self):
        self.link.close()

    def wait(self, count=1, limit_s=5.0):
        """Poll until so many transfers have ended; all endings so far."""
        until_s = time.monotonic() + limit_s
        while len(self.endings.transfers) < count:
            assert time.monotonic() < until_s, f"{self.endings} after {limit_s} s"
            self.poll_once()
            time.sleep(0.001)
        # One set of figures for each ending.
        assert sum(map(len, self.endings[:3])) == len(self.endings.transfers)
        return self.endings

    def reason(self):
        """Why the one transfer has failed."""
        (failure,) = self.wait().failed
        return failure.reason

    def fault(self, count=1):
        """The same as a label of metrics, of the last of `count` transfers."""
        return self.wait(count).transfers[-1].fault


class Request:
    """A request of `num_tokens` whose first `start` tokens the receiver has; slots in no order."""

    def __init__(self, num_tokens=100, start=0, request_id="r", ticket=TICKET):
        rng = np.random.default_rng(num_tokens)
        self.request_id, self.ticket, self.start = request_id, ticket, start
        self.token_ids = rng.integers(0, 99, num_tokens).tolist()
        self.source_slots = (1 + rng.permutation(NUM_SLOTS - 1)[:num_tokens]).tolist()
        self.target_slots = (1 + rng.permutation(NUM_SLOTS - 1)[: num_tokens - start]).tolist()

    def expected(self, epoch=SOURCE_EPOCH, **fields):
        source = KVSource(node_id="P", epoch=epoch, ticket=self.ticket)
        order = KVTransferOrder(
            request_id=self.request_id,
            start=self.start,
            slots=self.target_slots,
            token_ids=self.token_ids,
            source=source,
        )
        return order if not fields else KVTransferOrder(**{**_fields(order), **fields})

    def orders(self, address, *cuts, epoch=TARGET_EPOCH):
        """Orders to send [0, cuts[0]), [cuts[0], cuts[1]) ... up to the end."""
        target = KVTarget(node_id="D", epoch=epoch, address=address, ticket=self.ticket)
        edges = [0, *cuts, len(self.token_ids)]
        return [
            KVTransferOrder(
                request_id=self.request_id,
                start=a,
                slots=self.source_slots[a:b],
                token_ids=self.token_ids if b == len(self.token_ids) else [],
                target=target,
            )
            for a, b in itertools.pairwise(edges)
        ]


def _fields(order):
    return {name: getattr(order, name) for name in KVTransferOrder.__struct_fields__}


def main() -> None:
    if sys.argv[1] == "offer":
        end = End(("p2p",), epoch=SOURCE_EPOCH, seed=1, place="gpu", num_slots=int(sys.argv[2]))
        torch.cuda.synchronize()
        print(end.offer().hex(), flush=True)
        sys.stdin.read()
        os._exit(0)
    lane, place, address, epoch = sys.argv[1:]
    end = End((lane,), epoch=SOURCE_EPOCH, seed=1, place=place)
    end.send(Request().orders(address, 50, epoch=int(epoch))[0])
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
