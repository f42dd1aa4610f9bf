"""NIXL's agent of this process: registered memory, peers that it has met, reads of their memory.

Memory is registered once and used again, a peer is met once. A read from a peer that is frozen cannot be
taken back: its bytes may come at any time later, so that the memory which waits for them is nobody else's
until they have. Knows nothing of blocks and slots; any thread may use it.
"""

import contextlib
import importlib
import logging
import os
import secrets
import select
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from lightllm.errors import KVTransferError
from lightllm.transfer.channel import Channel
from lightllm.transfer.lane import LaneUnavailable

logger = logging.getLogger(__name__)

# UCX: no handler for SIGHUP. Both: what goes wrong is an exception here, and so a line of our log.
ENVIRONMENT = MappingProxyType({"UCX_DEBUG_SIGNO": "0", "UCX_LOG_LEVEL": "fatal", "NIXL_LOG_LEVEL": "FATAL"})
# The library's thread answers peers. It is woken by what arrives, and looks this often whether a wake-up was
# lost; with 0, the default, it never sleeps.
PROGRESS_US = 5_000
POLL_S = 50e-6
MAX_PEERS = 1024
CLOSE_LIMIT_S = 2.0


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sender's staging memory, and how to reach its agent; with the first block of a transfer."""

    agent: str
    metadata: bytes
    address: Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
    device: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    is_host: bool


class Memory:
    """A piece of registered memory.

    Attributes:
        data: uint8, contiguous.
        place: what a peer must know to read it.
        unended: a read into it that nobody waits for any more, as (request, peer); None if there is none.
        is_back: it has no user.
    """

    def __init__(self, data: Tensor, place: Place) -> None:
        self.data = data
        self.place = place
        self.unended: tuple[Any, str] | None = None
        self.is_back = False


class Agent:
    """See the module.

    Args:
        package: of the library.
        device: where memory is.

    Raises:
        LaneUnavailable: the library cannot be loaded, or does not start.
    """

    def __init__(self, package: str, device: torch.device) -> None:
        started_s = time.monotonic()
        self._device = device
        self._lib: Any = _load(package)
        names = [name for name in dir(self._lib) if name.startswith("nixl") and name.endswith("Error")]
        self._errors: tuple[type[Exception], ...] = tuple(getattr(self._lib, name) for name in names)
        self._name = f"lightllm-{secrets.token_hex(8)}"
        self._changed = threading.Condition()
        self._num_reading = 0
        self._is_closed = False
        self._free: dict[int, list[Memory]] = {}
        self._unended: list[Memory] = []
        self._met: OrderedDict[str, set[bytes]] = OrderedDict()  # metadata by the peer's name
        config = self._lib.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, PROGRESS_US
        config.useListenThread = False
        config.syncMode = self._lib.NIXL_THREAD_SYNC_STRICT
        try:
            self._use_device()
            self._agent: Any = self._lib.nixlAgent(self._name, config)
            self._backend = self._agent.createBackend("UCX", {})
        except self._errors as error:
            raise LaneUnavailable(f"NIXL does not start: {error}") from error
        logger.info("KV link: NIXL started in %.2f s", time.monotonic() - started_s)

    def take(self, size: int) -> Memory:
        """Registered memory of that many bytes, for one user.

        Raises:
            LaneUnavailable: it cannot be registered.
            KVTransferError: the agent is closed.
        """
        with self._changed:
            self._check_open()
            self._look_at_unended()
            free = self._free.setdefault(size, [])
            memory = free.pop() if free else self._register(size)
            memory.is_back = False
            return memory

    def give_back(self, memory: Memory) -> None:
        """The user is done with it. It stays registered for the next one, once no read into it goes on."""
        with self._changed:
            memory.is_back = True
            if memory.unended is None:
                self._free[len(memory.data)].append(memory)

    def read(
        self, source: Place, offset: int, memory: Memory, size: int, channel: Channel, limit_s: float
    ) -> None:
        """Read from a peer's memory into the beginning of ours; gives up when the channel is cut.

        Raises:
            KVTransferError: the peer is gone, or it takes too long.
        """
        with self._reading(source):
            own, other = self._kind(memory.place), self._kind(source)
            request = self._agent.createXferReq(
                self._lib.NIXL_READ,
                self._lib.nixlXferDList(own, [(memory.place.address, size, memory.place.device)]),
                self._lib.nixlXferDList(other, [(source.address + offset, size, source.device)]),
                source.agent,
                b"",
                [self._backend],
            )
            try:
                self._await_read(request, source, memory, channel, limit_s)
            except self._errors:
                with contextlib.suppress(*self._errors):
                    self._agent.releaseXferReq(request)
                raise
            self._agent.releaseXferReq(request)

    def _await_read(
        self, request: Any, source: Place, memory: Memory, channel: Channel, limit_s: float
    ) -> None:
        status, until_s = self._agent.postXferReq(request, b""), time.monotonic() + limit_s
        while status == self._lib.NIXL_IN_PROG:
            is_cut, is_late = _is_cut(channel), time.monotonic() > until_s
            if is_cut or is_late:
                self._abandon(memory, request, source.agent)
                text = "the peer has closed the connection" if is_cut else f"nothing came for {limit_s:g} s"
                fault = "peer_lost" if is_cut else "peer_silent"
                raise KVTransferError(f"reading by NIXL: {text}", fault=fault)
            time.sleep(POLL_S)
            status = self._agent.getXferStatus(request)

    def close(self) -> None:
        """Stop the library; transfers have been interrupted.

        Not while a read goes on: a frozen peer whose answer then finds nobody is ended by its UCX.
        """
        until_s = time.monotonic() + CLOSE_LIMIT_S
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: self._num_reading == 0, CLOSE_LIMIT_S)
            while self._unended and time.monotonic() < until_s:
                self._changed.wait(CLOSE_LIMIT_S / 100)
                self._look_at_unended()
            if self._num_reading or self._unended:
                logger.warning("KV link: NIXL is not stopped, because a peer owes an answer")
            else:
                self._agent = None  # its threads end here

    # ------------------------------------------------------------ with the lock held

    def _check_open(self) -> None:
        if self._is_closed:
            raise KVTransferError("this node stops", fault="stopped")

    def _register(self, size: int) -> Memory:
        self._use_device()
        data = torch.empty(size, dtype=torch.uint8, device=self._device)
        is_host, device = self._device.type == "cpu", self._device.index or 0
        place = Place(agent=self._name, metadata=b"", address=data.data_ptr(), device=device, is_host=is_host)
        pieces = self._lib.nixlRegDList(self._kind(place), [(place.address, size, device, "")])
        try:
            self._agent.registerMem(pieces, [self._backend])
            metadata = self._agent.getLocalPartialMD(pieces, True, [self._backend])
        except self._errors as error:
            raise LaneUnavailable(f"NIXL does not register {size} bytes: {error}") from error
        return Memory(data, msgspec.structs.replace(place, metadata=metadata))

    def _look_at_unended(self) -> None:
        """Take back the memory whose reads have ended by now."""
        for memory in [memory for memory in self._unended if self._has_ended(memory)]:
            self._unended.remove(memory)
            memory.unended = None
            if memory.is_back:
                self._free[len(memory.data)].append(memory)

    def _has_ended(self, memory: Memory) -> bool:
        assert memory.unended is not None
        request, _ = memory.unended
        try:
            if self._agent.getXferStatus(request) == self._lib.NIXL_IN_PROG:
                return False
            self._agent.releaseXferReq(request)
        except self._errors:
            pass  # the connection is gone, and the read with it
        return True

    def _meet(self, source: Place) -> None:
        """Let the library know the peer and this memory of it."""
        known = self._met.setdefault(source.agent, set())
        self._met.move_to_end(source.agent)
        if source.metadata not in known:
            self._agent.loadRemoteMD(source.metadata)
            known.add(source.metadata)
        if len(self._met) > MAX_PEERS:
            # Bytes of a read that has not ended may still come, even from a peer that is forgotten.
            reading = {memory.unended[1] for memory in self._unended if memory.unended is not None}
            self._forget(next(peer for peer in self._met if peer not in reading))

    def _forget(self, peer: str) -> None:
        self._met.pop(peer, None)
        try:
            self._agent.invalidateRemoteMD(peer)
        except self._errors:
            pass  # it was not known, or has been forgotten as it went

    # ------------------------------------------------------------ without

    @contextmanager
    def _reading(self, source: Place) -> Iterator[None]:
        """Meet a peer to read from; the library's errors become ours, and one that has gone is forgotten."""
        with self._changed:
            self._check_open()
            self._num_reading += 1
        try:
            self._use_device()
            with self._changed:
                self._meet(source)
            yield
        except self._errors as error:
            is_gone = isinstance(error, self._lib.nixlRemoteDisconnectError)
            if is_gone:
                with self._changed:
                    self._forget(source.agent)
            fault = "peer_lost" if is_gone else "other"
            raise KVTransferError(f"reading by NIXL: {error}", fault=fault) from error
        finally:
            with self._changed:
                self._num_reading -= 1
                self._changed.notify_all()

    def _abandon(self, memory: Memory, request: Any, peer: str) -> None:
        """Nobody waits for a read any more, which may go on."""
        with self._changed:
            memory.unended = request, peer
            self._unended.append(memory)

    def _kind(self, place: Place) -> Any:
        return self._lib.DRAM_SEG if place.is_host else self._lib.VRAM_SEG

    def _use_device(self) -> None:
        """Each thread that calls UCX must have the device's context."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)


def _load(package: str) -> Any:
    """The library, without what importing it does to the process."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    raises = logging.raiseExceptions
    try:
        library = importlib.import_module(f"{package}._bindings")
    except (ImportError, OSError) as error:
        raise LaneUnavailable(f"the package {package} cannot be loaded: {error}") from error
    finally:
        logging.raiseExceptions = raises
    # It logs to stdout by a handler of its own.
    chatty = logging.getLogger(package)
    chatty.handlers.clear()
    chatty.propagate = True
    chatty.setLevel(logging.WARNING)
    return library


def _is_cut(channel: Channel) -> bool:
    """Whether the peer has hung up, or we were interrupted; reads nothing."""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))
