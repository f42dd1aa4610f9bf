"""A KV transport without a network, for scheduler tests: the other node does what chance wants.

Hostile where a real one may be: until it reports the end of a transfer it writes into all slots of a receipt,
also after a cancellation, and reads all slots of a shipment, which must hold what they held when they were
ordered. A slot freed or reused too early fails here or in the fake worker's own checks.
"""

import itertools
import random

from lightllm.messages import KVArrival, KVFailure, KVTransfer

GARBAGE = "garbage"


class FakeTransport:
    """Transfers of one worker.

    Args:
        kv: slot -> hash, the worker's.
        extend_hash, next_token: the fake model.
        failure_share: of all transfers, so many fail.
        pace: chance that a transfer makes progress in a step.
    """

    def __init__(self, kv, extend_hash, next_token, *, seed=0, failure_share=0.0, pace=1.0):
        self.kv, self.extend_hash, self.next_token = kv, extend_hash, next_token
        self.random = random.Random(seed)
        self.failure_share, self.pace = failure_share, pace
        self.receipts = {}
        self.shipments = {}
        self.computed = {}
        self.cancelled = set()
        self.failed = set()
        self.num_ended = 0
        self.must_end = False

    def hashes(self, token_ids):
        return list(itertools.accumulate(token_ids, self.extend_hash, initial=0))[1:]

    def look(self, batch):
        """What may leave before the batch is computed, which must be there."""
        for order in batch.kv_sends:
            if order.is_computed:
                self.computed[order.request_id] = [self.kv[slot] for slot in order.slots]

    def take(self, batch):
        """Orders of a batch that has been computed."""
        for order in batch.kv_recvs:
            assert order.request_id not in self.receipts
            assert order.start + len(order.slots) == len(order.token_ids)
            assert order.source is not None
            self.receipts[order.request_id] = order
        for order in batch.kv_sends:
            is_first = order.start == 0
            if not is_first and order.request_id in self.failed:
                continue  # scheduled before the failure was heard of
            known = self.shipments.setdefault(order.request_id, [])
            start = known[-1][0].start + len(known[-1][0].slots) if known else 0
            assert order.start == start, f"{order.request_id}: shipped from {order.start}, expected {start}"
            assert order.slots
            held = [self.kv[slot] for slot in order.slots]
            if order.is_computed:
                assert held == self.computed.pop(order.request_id), f"{order.request_id}: not yet computed"
            known.append((order, held))
        self.cancelled.update(batch.kv_cancels)
        self.must_end = batch.is_restart

    def advance(self):
        """What has ended since the last step: fields of StepOutput."""
        ended = {"kv_received": [], "kv_sent": [], "kv_failed": []}
        known = {**dict.fromkeys(self.receipts, "received"), **dict.fromkeys(self.shipments, "sent")}
        for request_id in [*self.receipts, *self.shipments]:
            if self.random.random() >= self.pace and not self.must_end:
                continue
            is_failing = self.random.random() < self.failure_share
            if self.must_end and self.random.random() < 0.3:
                self.cancelled.discard(request_id)  # it had come through before
            if request_id in self.receipts:
                self._receive(request_id, ended, is_failing)
            else:
                self._send(request_id, ended, is_failing)
        self.num_ended += sum(map(len, ended.values()))
        gone = known.keys() - self.receipts.keys() - self.shipments.keys()
        figures = [KVTransfer(request_id=name, direction=known[name], transport="fake") for name in gone]
        return {**ended, "kv_transfers": figures}

    def _receive(self, request_id, ended, is_failing):
        order = self.receipts[request_id]
        if request_id in self.cancelled or is_failing:
            self.kv.update(dict.fromkeys(order.slots, GARBAGE))
            self._fail(self.receipts, request_id, ended)
            return
        hashes = self.hashes(order.token_ids)
        self.kv.update(zip(order.slots, hashes[order.start :], strict=True))
        ended["kv_received"].append(
            KVArrival(request_id=request_id, first_token_id=self.next_token(hashes[-1]))
        )
        del self.receipts[request_id]

    def _send(self, request_id, ended, is_failing):
        orders = self.shipments[request_id]
        for order, held in orders:
            assert [self.kv[slot] for slot in order.slots] == held, f"{request_id}: overwritten in flight"
        last = orders[-1][0]
        if request_id in self.cancelled or is_failing or (self.must_end and not last.token_ids):
            self._fail(self.shipments, request_id, ended)
        elif last.token_ids:
            sent = [value for _, held in orders for value in held]
            start = orders[0][0].start
            assert sent == self.hashes(last.token_ids)[start:], f"{request_id}: ships another KV"
            ended["kv_sent"].append(request_id)
            del self.shipments[request_id]

    def _fail(self, transfers, request_id, ended):
        self.cancelled.discard(request_id)
        del transfers[request_id]
        self.failed.add(request_id)
        ended["kv_failed"].append(KVFailure(request_id=request_id, reason="chance"))
