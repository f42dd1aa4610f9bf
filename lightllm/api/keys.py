"""Which key a request shows, and whether it is one of ours.

Used by the frontend's application and by the config_server's process.
"""

import hmac
from collections.abc import Iterable, Mapping


def is_known_key(headers: Mapping[bytes, bytes], keys: Iterable[bytes]) -> bool:
    """Whether `Authorization: Bearer KEY`, else `x-api-key: KEY`, has one of these.

    Every key is compared, in constant time, so that the time taken tells nothing about any of them.
    """
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    given = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
    is_known = False
    for key in keys:
        is_known |= hmac.compare_digest(given, key)
    return is_known
