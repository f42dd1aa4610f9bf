"""Peers: greeted connections to the KV links of other nodes, kept between transfers.

Dialling and greeting take about as long as what a small transfer has to say. A connection serves one transfer
at a time; one whose transfer has failed is not kept, so that whatever may still come on it meets nobody.
Threads of the transport share this.
"""

import threading
import time

from lightllm.transfer.channel import Channel

MAX_KEPT = 4
KEPT_S = 60.0


class Peers:
    """Connections that serve nobody at the moment, by the peer's address."""

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[float, Channel]]] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def take(self, address: str) -> Channel | None:
        """A connection to that peer, open as far as can be seen; None: there is none, dial."""
        with self._lock:
            self._drop_old()
            kept = self._kept.get(address, [])
            while kept:
                _, channel = kept.pop()
                # The peer has nothing to say before it is asked: what comes now is its end.
                if not channel.has_news(0.0):
                    return channel
                channel.close()
            return None

    def keep(self, address: str, channel: Channel) -> None:
        """Keep a connection whose transfer has come through, unless there are enough."""
        with self._lock:
            self._drop_old()
            kept = self._kept.setdefault(address, [])
            if self._is_closed or len(kept) >= MAX_KEPT:
                channel.close()
            else:
                kept.append((time.monotonic(), channel))

    def close(self) -> None:
        """Close all, and keep none any more."""
        with self._lock:
            self._is_closed = True
            for kept in self._kept.values():
                for _, channel in kept:
                    channel.close()
            self._kept.clear()

    def _drop_old(self) -> None:
        oldest_s = time.monotonic() - KEPT_S
        for address, kept in list(self._kept.items()):
            for since_s, channel in kept:
                if since_s < oldest_s:
                    channel.close()
            self._kept[address] = [one for one in kept if one[0] >= oldest_s]
            if not self._kept[address]:
                del self._kept[address]
