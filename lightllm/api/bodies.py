"""How much memory the bodies of all clients may take while they are received and parsed.

Each body has its own limit (--max_request_bytes) and 30 s to arrive; this is the limit for all of a process
together. Runs in the frontend's event loop; knows nothing of HTTP or JSON.
"""

import contextlib
from collections.abc import Iterator

from lightllm.errors import CapacityError

# Up to this size a body is small: there is room for it while large ones are turned away.
SMALL_BODY_BYTES = 64 * 1024
MAX_BODIES_BYTES = 256 * 1024 * 1024
RETRY_S = 1


class BodyShare:
    """What one body takes of the common room.

    Attributes:
        num_bytes: received so far.
    """

    def __init__(self, bodies: "Bodies") -> None:
        self.num_bytes = 0
        self._bodies = bodies

    def expect(self, num_bytes: int) -> None:
        """Refuse early what is announced and cannot be had now; takes nothing.

        Raises:
            CapacityError: queue_full.
        """
        self._bodies.require_room(num_bytes, is_large=num_bytes > SMALL_BODY_BYTES)

    def take(self, num_bytes: int) -> None:
        """Take room for what has been received.

        Raises:
            CapacityError: queue_full; this body keeps what it had.
        """
        self._bodies.require_room(num_bytes, is_large=self.num_bytes + num_bytes > SMALL_BODY_BYTES)
        self.num_bytes += num_bytes
        self._bodies.num_bytes += num_bytes


class Bodies:
    """The room that all bodies of a process share.

    Bytes count from their arrival until the body has been parsed. A body of more than 64 KiB, by what has
    come of it so far, gets more only while all together hold less than three quarters of the room; the last
    quarter is left to the small ones, so that these go on while large ones fill the rest. A refused body
    gives back what it had, so whoever was there first gets through. What is announced but does not come
    takes nothing: a client has to send in order to be in the way, and for 30 s at most.

    Args:
        max_request_bytes: of one body; there is always room for one of that size.

    Attributes:
        num_bytes: what all bodies hold now.
    """

    def __init__(self, max_request_bytes: int) -> None:
        self.num_bytes = 0
        self.max_bytes = max(MAX_BODIES_BYTES, 2 * max_request_bytes)
        self.max_large_bytes = self.max_bytes // 4 * 3

    @contextlib.contextmanager
    def share(self) -> Iterator[BodyShare]:
        """Room for one body, given back at the end however it ends."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            self.num_bytes -= share.num_bytes

    def require_room(self, num_bytes: int, *, is_large: bool) -> None:
        """Raise the 429 error that says that there is none for so many more bytes."""
        limit = self.max_large_bytes if is_large else self.max_bytes
        if self.num_bytes + num_bytes > limit:
            kind = f"bodies of more than {SMALL_BODY_BYTES} bytes" if is_large else "bodies"
            raise CapacityError(
                f"the bodies of requests on their way here hold {self.num_bytes} bytes; {num_bytes} more "
                f"would pass the limit of {limit} for {kind}; send this one again later",
                retry_after_s=RETRY_S,
            )
