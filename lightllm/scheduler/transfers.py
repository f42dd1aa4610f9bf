"""Transfers: which requests' KV the worker's transport may touch, and the orders that tell it so.

From its first order until its one event a transfer is live, and the slots of its request belong to nobody
else, whatever becomes of the request meanwhile. Decides nothing: that is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lightllm.messages import KVArrival, KVFailure, KVReserved, KVTransferOrder, StepOutput
from lightllm.packed_ints import pack
from lightllm.scheduler.request import Request, RequestState


class Orders(NamedTuple):
    """What the next batch tells the worker's transport."""

    sends: list[KVTransferOrder]
    recvs: list[KVTransferOrder]
    cancels: list[str]


class Transfers:
    """Live transfers by request id; orders and reservations on their way out.

    Attributes:
        receiving, sending: the requests in the two states of that name.
        live: all whose slots the transport may touch: these, prompts of which a part has left, and ended
            requests whose cancellation is not confirmed.
    """

    def __init__(self) -> None:
        self.receiving: dict[str, Request] = {}
        self.sending: dict[str, Request] = {}
        self.live: dict[str, Request] = {}
        self._orders = Orders([], [], [])
        self._reservations: list[KVReserved] = []

    def expect(self, request: Request) -> None:
        """Order the receipt of all tokens that are not computed; the request has slots for them."""
        request.state = RequestState.RECEIVING_KV
        start = request.num_computed_tokens
        self.receiving[request.request_id] = self.live[request.request_id] = request
        self._orders.recvs.append(
            KVTransferOrder(
                request_id=request.request_id,
                start=start,
                slots=request.slots[start:],
                token_ids=request.token_ids[:],
                source=request.recv_kv_from,
            )
        )
        self._reservations.append(KVReserved(request_id=request.request_id, num_cached_tokens=start))

    def ship(self, request: Request, count: int, now_s: float) -> None:
        """Order what the next step computes of the request, `count` tokens, and what is cached before that.

        The slots must be those that stay: after the request's chunk has been shared.
        """
        stop = request.num_computed_tokens
        is_last = stop == len(request.token_ids)
        if is_last:
            request.note("prompt_computed", now_s)
        self.live[request.request_id] = request
        for edge in (stop - count, stop):
            start, request.num_ordered_tokens = request.num_ordered_tokens, edge
            if start == edge:
                continue
            self._orders.sends.append(
                KVTransferOrder(
                    request_id=request.request_id,
                    start=start,
                    slots=request.slots[start:edge],
                    token_ids=request.token_ids[:] if is_last and edge == stop else pack(),
                    row=request.row,
                    is_computed=edge < stop,
                    target=request.send_kv_to,
                )
            )

    def cancel(self, request: Request) -> None:
        """Ask the transport to let go of a live transfer."""
        self._orders.cancels.append(request.request_id)

    def end(self, output: StepOutput, now_s: float) -> Iterator[tuple[Request, KVArrival | KVFailure | None]]:
        """The transport has let go of the slots of these requests; None stands for what was sent."""
        for arrival in output.kv_received:
            yield self._end(arrival.request_id, "kv_received", now_s), arrival
        for failure in output.kv_failed:
            yield self._end(failure.request_id, f"kv_failed: {failure.reason}", now_s), failure
        for request_id in output.kv_sent:
            yield self._end(request_id, "kv_sent", now_s), None

    def _end(self, request_id: str, event: str, now_s: float) -> Request:
        request = self.live.pop(request_id)
        request.note(event, now_s)
        self.leave(request)
        return request

    def leave(self, request: Request) -> None:
        """The request is not in one of the two states any more."""
        self.receiving.pop(request.request_id, None)
        self.sending.pop(request.request_id, None)

    @property
    def num_waiting(self) -> int:
        """Requests that compute nothing until their transfer ends."""
        return len(self.receiving) + len(self.sending)

    @property
    def has_orders(self) -> bool:
        """Whether the worker must be told something."""
        return any(self._orders)

    def take_orders(self) -> Orders:
        """The orders for the batch that is about to leave."""
        orders, self._orders = self._orders, Orders([], [], [])
        return orders

    def take_reservations(self) -> list[KVReserved]:
        """What the masters must be told, once the batch with the orders is on its way."""
        reservations, self._reservations = self._reservations, []
        return reservations

    def check_integrity(self) -> None:
        """Check that both states are those of live transfers."""
        for name, requests in (("receiving", self.receiving), ("sending", self.sending)):
            lost = requests.keys() - self.live.keys()
            assert not lost, f"{name} without a transfer: {lost}"
