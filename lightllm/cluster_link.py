"""The authenticated link between two nodes: cluster token, handshake, sealed frames. No I/O of its own.

L0; used by the frontend over WebSockets and by KV transports and workers over TCP streams. Both sides prove
that they know the cluster token without sending it, and every later frame carries a sequence number and a
MAC, so that nobody in between can forge, change, repeat or reorder one. Links are not encrypted. What the
frames say is the caller's business.

    acceptor                                    dialer
    Acceptor(...).challenge()      --challenge-->  Dialer(...).answer(challenge)
    .take_hello(frame)             <----hello----
    .welcome(epoch) or .refuse()   ---welcome--->  .finish(frame)
    Seal                           <--- sealed --> Seal

A `LinkRefused` of `take_hello` carries the frame to send before closing.
"""

import hashlib
import hmac
import os
import secrets
import struct
import tempfile
from pathlib import Path

import msgspec

from lightllm.errors import ClusterError, ConfigError

LINK_PROTOCOL = 1
HANDSHAKE_LIMIT_S = 5.0
MAX_FRAME_BYTES = 16 * 1024 * 1024
# Before the peer has proved anything, it may make us keep this much.
MAX_HANDSHAKE_BYTES = 64 * 1024
MIN_TOKEN_BYTES = 16
NONCE_BYTES = 32
MAC_BYTES = 16
TOKEN_FILE = "cluster_token"

_SEQUENCE = struct.Struct(">Q")
_LENGTH = struct.Struct("<I")
HEAD_BYTES = _SEQUENCE.size + MAC_BYTES


# ---------------------------------------------------------------- the token


def cluster_token(given: str | None, home: str) -> bytes:
    """The secret of this cluster: what the flag or variable says, else the user's token file, made on need.

    Args:
        given: `--cluster_token` or LIGHTLLM_CLUSTER_TOKEN, None where neither is set.
        home: `Environment.home`, below which the file lies.

    Raises:
        ConfigError: the token is too short, or others may read the file, or it cannot be read or made.
    """
    if given is not None:
        return _checked(given, "--cluster_token")
    path = Path(home) / TOKEN_FILE
    try:
        if not path.exists():
            _make_file(path)
        mode = path.stat().st_mode & 0o777
        text = path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the cluster token file {path} cannot be used: {error}") from error
    if mode & 0o077:
        raise ConfigError(
            f"{path} has mode {mode:04o}; a cluster token may be read by its owner only: chmod 600 {path}"
        )
    return _checked(text, str(path))


def _checked(text: str, source: str) -> bytes:
    token = text.strip().encode()
    if len(token) < MIN_TOKEN_BYTES:
        raise ConfigError(
            f"{source}: the cluster token has {len(token)} bytes; at least {MIN_TOKEN_BYTES} are needed: "
            "python -c 'import secrets; print(secrets.token_hex(32))' makes one"
        )
    return token


def _make_file(path: Path) -> None:
    """Make the file in one go: of several nodes that start together, one makes it and all read it whole."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, draft = tempfile.mkstemp(prefix=f".{TOKEN_FILE}-", dir=path.parent)  # with mode 0600
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
        os.link(draft, path)
    except FileExistsError:
        pass  # another node was faster
    finally:
        os.unlink(draft)


# ---------------------------------------------------------------- handshake


class LinkRefused(ClusterError):
    """The handshake failed.

    Attributes:
        reason: a word for programs: bad_token, bad_protocol, bad_frame, or what the acceptor refused with.
        diff: lines that show what does not fit.
        frame: what the acceptor sends before it closes; empty on the dialer's side.
    """

    def __init__(self, reason: str, message: str, *, diff: tuple[str, ...] = (), frame: bytes = b"") -> None:
        super().__init__(message)
        self.reason = reason
        self.diff = diff
        self.frame = frame


class LinkBroken(ClusterError):
    """A frame is not the peer's next one: the link must be closed."""


class _Frame(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of the handshake's frames."""


class Challenge(_Frame, frozen=True):
    """The acceptor's first word."""

    proto: int
    nonce: bytes


class Hello(_Frame, frozen=True):
    """Who dials, and for what: `purpose` is the kind of link, `detail` msgpack that belongs to it.

    `epoch` is random per process start. `mac` is over the challenge's nonce and everything else.
    """

    proto: int
    purpose: str
    node_id: str
    epoch: int
    nonce: bytes
    detail: bytes = b""
    mac: bytes = b""


class Welcome(_Frame, frozen=True):
    """The acceptor knows the token, too, and takes the link."""

    node_id: str
    epoch: int
    mac: bytes = b""


class Refused(_Frame, frozen=True):
    """The acceptor will have none of it: `code` for programs, the rest for the log."""

    code: str
    text: str
    diff: tuple[str, ...] = ()


_ENCODER = msgspec.msgpack.Encoder()
_FROM_ACCEPTOR: msgspec.msgpack.Decoder[Challenge | Welcome | Refused] = msgspec.msgpack.Decoder(
    Challenge | Welcome | Refused
)
_FROM_DIALER = msgspec.msgpack.Decoder(Hello)

WRONG_TOKEN = (
    "the cluster tokens differ: copy $LIGHTLLM_HOME/cluster_token (~/.lightllm/cluster_token) from one "
    "machine to the other, or set LIGHTLLM_CLUSTER_TOKEN to the same text on both"
)


def new_epoch() -> int:
    """A number that tells this life of a process from its earlier ones."""
    return secrets.randbits(62)


class Acceptor:
    """The side that was dialled. Serves one handshake."""

    def __init__(self, token: bytes, purpose: str) -> None:
        self._token = token
        self._purpose = purpose
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._hello: Hello | None = None

    def challenge(self) -> bytes:
        """The first frame."""
        return _ENCODER.encode(Challenge(proto=LINK_PROTOCOL, nonce=self._nonce))

    def take_hello(self, frame: bytes) -> Hello:
        """Check the dialer's answer.

        Raises:
            LinkRefused: send its `frame`, then close.
        """
        try:
            hello = _FROM_DIALER.decode(frame)
        except msgspec.DecodeError as error:
            raise self.refuse("bad_frame", "not a hello of a lightllm node") from error
        if hello.proto != LINK_PROTOCOL:
            raise self.refuse(
                "bad_protocol", f"link protocol {hello.proto} there, {LINK_PROTOCOL} here: run equal versions"
            )
        wanted = _mac(self._token, b"hello", self._nonce, _unsigned(hello))
        if not hmac.compare_digest(wanted, hello.mac):
            raise self.refuse("bad_token", WRONG_TOKEN)
        # A dialer must add something of its own, or old frames of ours could be played back to it.
        if len(hello.nonce) != NONCE_BYTES or hello.nonce == self._nonce:
            raise self.refuse("bad_frame", f"a nonce has {NONCE_BYTES} bytes of its own")
        if hello.purpose != self._purpose:
            raise self.refuse("bad_purpose", f"this is a {self._purpose} link, not {hello.purpose[:40]}")
        self._hello = hello
        return hello

    def welcome(self, node_id: str, epoch: int) -> tuple[bytes, "Seal"]:
        """The last frame of a handshake that succeeds, and the seal of what follows."""
        assert self._hello is not None, "take_hello comes first"
        welcome = Welcome(node_id=node_id, epoch=epoch)
        mac = _mac(self._token, b"welcome", self._nonce, self._hello.nonce, _unsigned(welcome))
        dialer, acceptor = _link_keys(self._token, self._nonce, self._hello.nonce)
        return _ENCODER.encode(msgspec.structs.replace(welcome, mac=mac)), Seal(acceptor, dialer)

    def refuse(self, code: str, text: str, diff: tuple[str, ...] = ()) -> LinkRefused:
        """The error to raise, or whose frame to send, when the link is not wanted."""
        frame = _ENCODER.encode(Refused(code=code, text=text, diff=diff))
        return LinkRefused(code, text, diff=diff, frame=frame)


class Dialer:
    """The side that dials. Serves one handshake.

    Args:
        token: as `cluster_token` returns it.
        purpose: the kind of link; both sides must mean the same.
        node_id, epoch: who we are.
        detail: msgpack for the acceptor, covered by the proof.
    """

    def __init__(self, token: bytes, purpose: str, node_id: str, epoch: int, detail: bytes = b"") -> None:
        self._token = token
        self._hello = Hello(
            proto=LINK_PROTOCOL,
            purpose=purpose,
            node_id=node_id,
            epoch=epoch,
            nonce=secrets.token_bytes(NONCE_BYTES),
            detail=detail,
        )
        self._nonce = b""

    def answer(self, frame: bytes) -> bytes:
        """Answer the challenge.

        Raises:
            LinkRefused: the peer does not speak this protocol, or refuses.
        """
        challenge = self._decode(frame)
        if not isinstance(challenge, Challenge) or len(challenge.nonce) != NONCE_BYTES:
            raise LinkRefused("bad_frame", "the peer did not begin with a challenge")
        self._nonce = challenge.nonce
        mac = _mac(self._token, b"hello", self._nonce, _unsigned(self._hello))
        return _ENCODER.encode(msgspec.structs.replace(self._hello, mac=mac))

    def finish(self, frame: bytes) -> tuple[Welcome, "Seal"]:
        """Check the acceptor's proof.

        Raises:
            LinkRefused: it refused, or it does not know the token.
        """
        welcome = self._decode(frame)
        if not isinstance(welcome, Welcome) or not self._nonce:
            raise LinkRefused("bad_frame", "the peer did not answer with a welcome")
        nonces = (self._nonce, self._hello.nonce)
        if not hmac.compare_digest(_mac(self._token, b"welcome", *nonces, _unsigned(welcome)), welcome.mac):
            raise LinkRefused("bad_token", WRONG_TOKEN)
        dialer, acceptor = _link_keys(self._token, *nonces)
        return welcome, Seal(dialer, acceptor)

    def _decode(self, frame: bytes) -> Challenge | Welcome:
        try:
            message = _FROM_ACCEPTOR.decode(frame)
        except msgspec.DecodeError as error:
            raise LinkRefused("bad_frame", "the peer does not speak the link protocol of lightllm") from error
        if isinstance(message, Refused):
            raise LinkRefused(message.code, message.text, diff=message.diff)
        return message


def _unsigned(message: Hello | Welcome) -> bytes:
    return _ENCODER.encode(msgspec.structs.replace(message, mac=b""))


def _mac(key: bytes, label: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 over parts whose borders are part of what is proved."""
    text = b"".join(_SEQUENCE.pack(len(part)) + part for part in (b"lightllm link", label, *parts))
    return hmac.digest(key, text, hashlib.sha256)


def signature(token: bytes, purpose: str, *parts: bytes) -> bytes:
    """Shows, of what is kept in a third place, that its writer knew the token; equal for equal arguments."""
    return _mac(token, b"signature", purpose.encode(), *parts)[:MAC_BYTES]


def _link_keys(token: bytes, challenge: bytes, hello: bytes) -> tuple[bytes, bytes]:
    """One key for each direction, the dialer's first: a frame cannot be sent back to where it came from."""
    return _mac(token, b"from dialer", challenge, hello), _mac(token, b"from acceptor", challenge, hello)


# ---------------------------------------------------------------- frames behind the handshake


class Seal:
    """Makes and checks the frames of one link: 8 bytes of sequence number, 16 of MAC, then the body."""

    __slots__ = ("_key_in", "_key_out", "_next_in", "_next_out")

    def __init__(self, key_out: bytes, key_in: bytes) -> None:
        self._key_out = key_out
        self._key_in = key_in
        self._next_out = 0
        self._next_in = 0

    def seal(self, body: bytes) -> bytes:
        """Put number and MAC in front of a body; frames must be sent in the order in which they are sealed.

        Raises:
            ValueError: the body is over MAX_FRAME_BYTES, which the peer would not take.
        """
        if len(body) + HEAD_BYTES > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {len(body) + HEAD_BYTES} bytes; the limit is {MAX_FRAME_BYTES}")
        number = _SEQUENCE.pack(self._next_out)
        self._next_out += 1
        mac = hmac.digest(self._key_out, number + body, "sha256")
        return b"".join((number, mac[:MAC_BYTES], body))

    def open(self, frame: bytes) -> bytes:
        """The body of the peer's next frame.

        Raises:
            LinkBroken: it was forged, changed, repeated, or one before it is missing.
        """
        number, mac, body = frame[: _SEQUENCE.size], frame[_SEQUENCE.size : HEAD_BYTES], frame[HEAD_BYTES:]
        if len(frame) < HEAD_BYTES or len(frame) > MAX_FRAME_BYTES:
            raise LinkBroken(f"a frame of {len(frame)} bytes; allowed {HEAD_BYTES}..{MAX_FRAME_BYTES}")
        wanted = hmac.digest(self._key_in, number + body, "sha256")[:MAC_BYTES]
        if not hmac.compare_digest(wanted, mac):
            raise LinkBroken("a frame whose MAC is wrong")
        if _SEQUENCE.unpack(number)[0] != self._next_in:
            raise LinkBroken(f"frame {_SEQUENCE.unpack(number)[0]}; {self._next_in} is the next one")
        self._next_in += 1
        return body


class StreamFrames:
    """Cuts a byte stream (TCP) into frames of 4 bytes little-endian length and that many bytes.

    Attributes:
        limit_bytes: the longest frame taken; raise it to MAX_FRAME_BYTES once the handshake is done.
    """

    def __init__(self) -> None:
        self.limit_bytes = MAX_HANDSHAKE_BYTES
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        self._buffer += data

    def next_frame(self) -> bytes | None:
        """The next whole frame, None while there is none.

        Raises:
            LinkBroken: a length over the limit; what comes is no frame of ours.
        """
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > self.limit_bytes:
            raise LinkBroken(f"a frame of {length} bytes; the limit is {self.limit_bytes}")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return frame

    @staticmethod
    def wrap(frame: bytes) -> bytes:
        """Put the length in front of a frame."""
        return _LENGTH.pack(len(frame)) + frame
