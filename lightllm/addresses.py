"""Network addresses as people write them, made equal for every library that reads them.

L0: used by the flag parser and by the clients. `127.0.01` is a legal short form for `inet_aton` and
`getaddrinfo` but not for `inet_pton`, the `ipaddress` module or most HTTP libraries, so addresses are
normalised once, here.
"""

import ipaddress
import re
import socket

_NUMERIC = re.compile(r"[0-9.]+")
_HOST_PORT = re.compile(r"(?:\[([^\s\[\]]*:[^\s\[\]]*)\]|([^\s\[\]:]+)):([0-9]{1,5})")
# Underscores are no legal host names, but container networks are full of them.
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


def normalize_host(host: str) -> str:
    """Return the dotted quad that a short numeric form stands for; any other text unchanged.

    `127.0.01` -> `127.0.0.1`; a leading zero means octal, as for `inet_aton`.
    """
    if not _NUMERIC.fullmatch(host):
        return host
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return host


def is_address(host: str) -> bool:
    """Whether a normalised text is an IPv4 or IPv6 literal or could be a host name (nothing is looked up)."""
    if ":" in host or _NUMERIC.fullmatch(host):
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True
    return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in host.removesuffix(".").split("."))


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine only: a server's is reached, and a client's comes, from here."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def split_addresses(text: str) -> list[tuple[str, int]]:
    """Take `host:port[,host:port]` apart; an IPv6 literal stands in brackets. Hosts are normalised.

    Raises:
        ValueError: one of them is not such an address; it is named.
    """
    found = []
    for part in text.split(","):
        match = _HOST_PORT.fullmatch(part)
        host = normalize_host((match[1] or match[2]) if match else "")
        if match is None or not is_address(host) or not 0 < int(match[3]) < 65536:
            raise ValueError(f"{part!r} is not HOST:PORT")
        found.append((host, int(match[3])))
    return found


def join_address(host: str, port: int) -> str:
    """host:port as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
