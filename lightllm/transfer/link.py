"""KVLink: the transport of a node that takes part in prefill/decode disaggregation.

Owns the listening socket and the threads: one accepts, one serves each connection, one runs each shipment,
and one speaks for those that wait for a step.
What a transfer does stands in shipment.py and receipt.py; the ways of the bytes in lane.py. Runs in the
worker process.
"""

import logging
import socket
import threading
import time
from functools import partial

import msgspec

from lightllm.cluster_link import Acceptor, LinkBroken, LinkRefused, Refused
from lightllm.device.base import Moment
from lightllm.errors import BindError, KVTransferError
from lightllm.messages import KVTransferOrder
from lightllm.transfer import frames
from lightllm.transfer.base import Hold, Transport, fault_of
from lightllm.transfer.channel import Channel
from lightllm.transfer.crew import Crew
from lightllm.transfer.frames import Choice, LaneOffer, Opening
from lightllm.transfer.lane import Cut, LaneUnavailable, ReceivingEnd
from lightllm.transfer.peers import KEPT_S, Peers
from lightllm.transfer.receipt import Intake, Receipt
from lightllm.transfer.shipment import Node, Sending, Shipment

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
CLOSE_LIMIT_S = 2.0
# A connection that serves nobody is closed by the receiver, too, should the sender not do it.
IDLE_LIMIT_S = 2 * KEPT_S


class KVLink(Transport):
    """Sends to and receives from the KV links of other nodes.

    Args:
        host, port: where peers may dial; port 0 takes a free one.
        advertised_host: what they dial, if that is not `host`.

    Raises:
        BindError: the address is taken or not ours.
    """

    def __init__(self, node: Node, host: str, port: int, advertised_host: str | None = None) -> None:
        super().__init__()
        self._node = node
        self._sendings: dict[str, Sending] = {}
        self._receipts: dict[str, Receipt] = {}  # by ticket
        self._changed = threading.Condition()
        self._choices: dict[str, str] = {}  # by node
        self._crew = Crew()
        self._connections: set[Channel] = set()
        self._peers = Peers()
        self._closed = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=256)
        except OSError as error:
            raise BindError(f"--kv_port {port} on {host}: {error}; choose another one, or 0") from error
        shown = advertised_host or host
        shown = f"[{shown}]" if ":" in shown else shown
        self.address = f"tcp://{shown}:{self._listener.getsockname()[1]}"
        self._crew.do(self._accept)
        self._crew.do(self._keep_alive)

    def receive(self, order: KVTransferOrder, free: Moment) -> None:
        hold = Hold(order.request_id, self._ledger, "received")
        receipt = Receipt(self._node, order, hold, free)
        with self._changed:
            self._forget_ended()
            if receipt.source.ticket in self._receipts:
                hold.fail("its ticket is in use for another transfer", "bad_ticket")
                return
            self._receipts[receipt.source.ticket] = receipt
            self._changed.notify_all()

    def send(self, order: KVTransferOrder, written: Moment) -> None:
        sending = self._sending(order.request_id)
        if order.start == 0:
            hold = Hold(order.request_id, self._ledger, "sent")
            sending = Sending(self._node, self._peers, order, hold)
            with self._changed:
                self._forget_ended()
                self._sendings[order.request_id] = sending
            for shipment in sending.shipments:
                self._crew.do(partial(self._ship, sending, shipment))
        if sending is not None:
            sending.add(order, written)

    def complete(self, request_id: str, first_token_id: int) -> None:
        sending = self._sending(request_id)
        if sending is not None:
            sending.complete(first_token_id)

    def cancel(self, *request_ids: str) -> None:
        with self._changed:
            moving: list[Sending | Receipt] = [*self._sendings.values(), *self._receipts.values()]
        self._give_up([one for one in moving if one.hold.request_id in request_ids], "cancelled", "cancelled")

    def close(self) -> None:
        self._closed.set()
        # A thread that waits in accept() is woken by a shutdown, not by a close.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._changed:
            moving: list[Sending | Receipt] = [*self._sendings.values(), *self._receipts.values()]
            connections = list(self._connections)
            self._changed.notify_all()
        self._give_up(moving, "this node stops", "stopped")
        for transfer in moving:
            transfer.interrupt()
        for channel in connections:
            channel.interrupt()
        self._peers.close()
        # A thread inside torch when the interpreter ends would take the process down with it.
        self._crew.close(time.monotonic() + CLOSE_LIMIT_S)
        self._node.lanes.close()

    def _give_up(self, transfers: list[Sending | Receipt], reason: str, fault: str) -> None:
        """Fail them; those that have promised something are waited for together."""
        for transfer in transfers:
            transfer.hold.will_fail(reason, fault)
        for transfer in transfers:
            if transfer.hold.fail(reason, fault):
                transfer.interrupt()

    # ------------------------------------------------------------ in threads

    def _ship(self, sending: Sending, shipment: Shipment) -> None:
        if not shipment.run():
            sending.interrupt()  # the others have nothing to wait for

    def _keep_alive(self) -> None:
        while not self._closed.wait(self._node.limits.alive_s):
            with self._changed:
                shipments = [one for sending in self._sendings.values() for one in sending.shipments]
            for shipment in shipments:
                shipment.keep_alive()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                sock, peer = self._listener.accept()
            except OSError as error:
                if not self._closed.is_set():
                    logger.warning("KV link: cannot accept a connection: %s", error)
                    time.sleep(0.1)
                continue
            channel = Channel(sock)
            with self._changed:
                is_full, is_closed = len(self._connections) >= MAX_CONNECTIONS, self._closed.is_set()
                if not (is_full or is_closed):
                    self._connections.add(channel)
            if is_full or is_closed:
                channel.close()
                if is_full:
                    logger.warning("KV link: more than %d connections; one was refused", MAX_CONNECTIONS)
            else:
                self._crew.do(partial(self._serve, channel, str(peer[0])))

    def _serve(self, channel: Channel, peer: str) -> None:
        """One connection, from its greeting to its end; transfers one after the other."""
        limits = self._node.limits
        try:
            epoch = self._greet(channel)
            while channel.has_news(IDLE_LIMIT_S) and not channel.is_closed_there():
                self._converse(channel, epoch, channel.receive(Opening, limits.silence_s))
        except LinkRefused as refusal:
            logger.warning("KV link: refused %s: %s %s", peer, refusal, "; ".join(refusal.diff))
            self._tell(channel, refusal)
        except (KVTransferError, OSError) as error:
            logger.info("KV link: connection from %s ended: %s", peer, error)
        except (LinkBroken, msgspec.DecodeError) as error:
            logger.warning("KV link: closed a connection from %s: %s", peer, error)
        finally:
            channel.close()
            with self._changed:
                self._connections.discard(channel)

    def _greet(self, channel: Channel) -> int:
        """Let the peer prove that it has our token; its epoch."""
        limit_s = self._node.limits.handshake_s
        acceptor = Acceptor(self._node.token, frames.PURPOSE)
        channel.send_raw(acceptor.challenge(), limit_s)
        hello = acceptor.take_hello(channel.receive_raw(limit_s))
        welcome, channel.seal = acceptor.welcome(socket.gethostname(), self._node.epoch)
        channel.send_raw(welcome, limit_s)
        return hello.epoch

    def _tell(self, channel: Channel, refusal: LinkRefused) -> None:
        """Why it was refused; to a peer without our token by the frame that it can read."""
        limit_s = self._node.limits.handshake_s
        try:
            if channel.seal is None:
                channel.send_raw(refusal.frame, limit_s)
            else:
                channel.send(Refused(code=refusal.reason, text=refusal.message, diff=refusal.diff), limit_s)
        except KVTransferError:
            pass  # it did not wait for an answer

    def _converse(self, channel: Channel, epoch: int, opening: Opening) -> None:
        """One transfer from a peer of that epoch."""
        intake = self._admit(epoch, opening, channel)
        receipt, end, is_done = intake.receipt, None, False
        try:
            lane, end, cut = self._choose_lane(opening.lanes, intake)
            receipt.hold.lane = lane
            channel.send(Choice(lane=lane, start=receipt.start), self._node.limits.handshake_s)
            intake.run(channel, end, cut)
            receipt.release(channel)
            is_done = True
        except (KVTransferError, LinkBroken, LinkRefused, OSError) as error:
            receipt.hold.fail(f"receiving KV from {receipt.source.node_id}: {error}", fault_of(error))
            raise
        finally:
            if not is_done:
                receipt.hold.fail("receiving KV ended without a result")
                receipt.interrupt(but=channel)  # the other ranks have nothing to wait for
            if end is not None:
                end.close()

    def _admit(self, epoch: int, opening: Opening, channel: Channel) -> Intake:
        """What this peer's ticket admits it to.

        Raises:
            LinkRefused: there is none for it.
        """
        node = self._node
        if opening.target_epoch != node.epoch:
            text = f"this is epoch {node.epoch}, not {opening.target_epoch}: the node was restarted"
            raise LinkRefused("old_epoch", text)
        with self._changed:
            self._changed.wait_for(
                lambda: opening.ticket in self._receipts or self._closed.is_set(), node.limits.ticket_s
            )
            receipt = self._receipts.get(opening.ticket)
        if receipt is None:
            raise LinkRefused("bad_ticket", "no transfer is expected under this ticket")
        if epoch != receipt.source.epoch:
            text = f"the transfer is expected from epoch {receipt.source.epoch}, not {epoch}"
            raise LinkRefused("old_epoch", text)
        expected = self._expected(opening)
        if not receipt.claim(channel, opening.rank, opening.layout.tp_size, len(expected)):
            raise LinkRefused("bad_ticket", "the ticket was used, or the transfer was given up")
        differences = node.layout.differences(opening.layout)
        diff = tuple(f"{name}: here {own!r}, there {other!r}" for name, own, other in differences)
        if diff:
            text = f"the KV of the two nodes does not fit: {'; '.join(diff)}"
            receipt.hold.fail(text, "bad_layout")
            raise LinkRefused("bad_layout", text, diff=diff)
        return Intake(receipt, expected[opening.rank])

    def _expected(self, opening: Opening) -> dict[int, range]:
        """The KV heads that each rank of a sender has for this one; the peer is one of these ranks.

        Raises:
            LinkRefused: it is not.
        """
        try:
            expected = {p.source_rank: p.heads for p in self._node.receives(opening.layout.tp_size)}
        except KVTransferError as error:
            raise LinkRefused("bad_layout", str(error)) from error
        if opening.rank not in expected:
            ranks = ", ".join(map(str, expected))
            text = (
                f"rank {opening.rank} of {opening.layout.tp_size} has nothing for rank {self._node.rank} here"
            )
            raise LinkRefused("bad_layout", f"{text}; it expects {ranks}")
        return expected

    def _choose_lane(self, offers: list[LaneOffer], intake: Intake) -> tuple[str, ReceivingEnd, Cut]:
        """The first of the sender's lanes that both can use; the log says where that has changed."""
        lanes, node_id, reasons = self._node.lanes, intake.receipt.source.node_id, []
        for offer in offers:
            if offer.name not in lanes.names:
                reasons.append(f"{offer.name}: not open here")
                continue
            cut = lanes[offer.name].cut(intake.rows)
            try:
                end = lanes[offer.name].open_receiver(offer.fields, cut)
            except LaneUnavailable as error:
                reasons.append(f"{offer.name}: {error}")
                continue
            choice = f"{offer.name}{''.join(f'; not {reason}' for reason in reasons)}"
            if self._choices.get(node_id) != choice:
                self._choices[node_id] = choice
                logger.info("KV link: KV of node %s comes by %s", node_id, choice)
            return offer.name, end, cut
        text = "no common --kv_transport"
        raise LinkRefused("no_lane", f"{text}: {'; '.join(reasons)}", diff=tuple(reasons))

    def _sending(self, request_id: str) -> Sending | None:
        with self._changed:
            return self._sendings.get(request_id)

    def _forget_ended(self) -> None:
        """Drop transfers that have ended; holds the condition's lock."""
        for request_id in [i for i, s in self._sendings.items() if s.hold.is_over]:
            del self._sendings[request_id]
        for ticket in [t for t, r in self._receipts.items() if r.hold.is_over]:
            del self._receipts[ticket]
