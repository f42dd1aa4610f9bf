"""Two ends of a KV link for tests, in this process or, run as a program, the sender in one of its own.

python -m tests.transfer.nodes LANE ADDRESS TARGET_EPOCH     ships half of a request, then waits
"""

import itertools
import os
import sys
import time

import numpy as np
import torch

from lightllm.device.base import PastMoment
from lightllm.device.kv_pool import KVPool
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
PAST = PastMoment()
LIMITS = Limits(handshake_s=2.0, silence_s=1.0, alive_s=0.2, ticket_s=0.5)
MODEL = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 99,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
)
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


class End:
    """One node: a pool with numbers in it, and its link."""

    def __init__(self, lanes=("shm", "tcp"), *, epoch, seed, token=TOKEN, layout=LAYOUT, limits=LIMITS):
        self.pool = KVPool(MODEL, NUM_SLOTS, torch.float32)
        torch.manual_seed(seed)
        for tensor in (*self.pool.k, *self.pool.v):
            tensor.normal_()
        self.node = Node(
            layout=layout,
            token=token,
            epoch=epoch,
            lanes=open_lanes(lanes, HostRows(self.pool), BLOCK_BYTES),
            limits=limits,
        )
        self.link = KVLink(self.node, "127.0.0.1", 0)
        self.endings = Endings([], [], [])

    def kv(self, slots):
        """[2 * layers, n, heads, head_dim] of these slots."""
        return torch.stack([tensor[slots] for tensor in (*self.pool.k, *self.pool.v)])

    def send(self, order, first_token_id=None, written=PAST):
        """Send an order, and the first token with the last one."""
        self.link.send(order, written)
        if first_token_id is not None:
            self.link.complete(order.request_id, first_token_id)

    def receive(self, order, free=PAST):
        self.link.receive(order, free)

    def wait(self, count=1, limit_s=5.0):
        """Poll until so many transfers have ended; all endings so far."""
        until_s = time.monotonic() + limit_s
        while sum(map(len, self.endings)) < count:
            assert time.monotonic() < until_s, f"{self.endings} after {limit_s} s"
            for known, new in zip(self.endings, self.link.poll(), strict=True):
                known += new
            time.sleep(0.001)
        return self.endings

    def reason(self):
        """Why the one transfer has failed."""
        (failure,) = self.wait().failed
        return failure.reason


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
        """Orders to send [start, cuts[0]), [cuts[0], cuts[1]) ... up to the end."""
        target = KVTarget(
            node_id="D", epoch=epoch, address=address, ticket=self.ticket, num_cached_tokens=self.start
        )
        edges = [self.start, *cuts, len(self.token_ids)]
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
    lane, address, epoch = sys.argv[1:]
    end = End((lane,), epoch=SOURCE_EPOCH, seed=1)
    end.send(Request().orders(address, 50, epoch=int(epoch))[0])
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
