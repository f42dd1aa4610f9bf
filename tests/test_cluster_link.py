"""The link between nodes: the token file, both sides of the handshake, and frames that cannot be forged."""

import os
import pickle
import socket
import threading
from pathlib import Path

import msgspec
import pytest

from lightllm import cluster_link
from lightllm.cluster_link import (
    MAX_FRAME_BYTES,
    Acceptor,
    Dialer,
    LinkBroken,
    LinkRefused,
    Seal,
    StreamFrames,
    cluster_token,
    new_epoch,
    signature,
)
from lightllm.errors import ConfigError

TOKEN = b"0123456789abcdef0123456789abcdef"


def handshake(token_a: bytes = TOKEN, token_d: bytes = TOKEN) -> tuple[Seal, Seal]:
    """The acceptor's and the dialer's seal."""
    acceptor = Acceptor(token_a, "test")
    dialer = Dialer(token_d, "test", "node-1", 7, b"detail")
    hello = acceptor.take_hello(dialer.answer(acceptor.challenge()))
    assert (hello.node_id, hello.epoch, hello.detail) == ("node-1", 7, b"detail")
    frame, ours = acceptor.welcome("master", 9)
    welcome, theirs = dialer.finish(frame)
    assert (welcome.node_id, welcome.epoch) == ("master", 9)
    return ours, theirs


# ---------------------------------------------------------------- token


def test_the_token_file_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    home = tmp_path / "home"
    token = cluster_token(None, str(home))
    assert len(token) == 64
    assert cluster_token(None, str(home)) == token
    assert (home / "cluster_token").stat().st_mode & 0o777 == 0o600
    assert os.listdir(home) == ["cluster_token"]


def test_nodes_that_start_together_end_with_one_token(tmp_path: Path) -> None:
    tokens: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: tokens.append(cluster_token(None, str(tmp_path)))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tokens) == 16
    assert len(set(tokens)) == 1


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    cluster_token(None, str(tmp_path))
    (tmp_path / "cluster_token").chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 0640.*chmod 600"):
        cluster_token(None, str(tmp_path))


def test_a_given_token_wins_and_must_not_be_short(tmp_path: Path) -> None:
    assert cluster_token(" sixteen-bytes-xx\n", str(tmp_path)) == b"sixteen-bytes-xx"
    assert not os.listdir(tmp_path)
    with pytest.raises(ConfigError, match="has 5 bytes; at least 16"):
        cluster_token("short", str(tmp_path))


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        cluster_token(None, str(tmp_path / "file"))


# ---------------------------------------------------------------- handshake


def test_both_sides_agree_on_keys() -> None:
    ours, theirs = handshake()
    for body in (b"", b"one", b"two" * 1000):
        assert theirs.open(ours.seal(body)) == body
        assert ours.open(theirs.seal(body)) == body


def test_a_wrong_token_is_refused_on_both_sides_with_the_remedy() -> None:
    acceptor = Acceptor(TOKEN, "test")
    dialer = Dialer(TOKEN + b"x", "test", "n", 1)
    with pytest.raises(LinkRefused) as refusal:
        acceptor.take_hello(dialer.answer(acceptor.challenge()))
    assert refusal.value.reason == "bad_token"
    with pytest.raises(LinkRefused, match=r"copy .*cluster_token") as heard:
        dialer.finish(refusal.value.frame)
    assert heard.value.reason == "bad_token"


def test_an_acceptor_without_the_token_is_found_out() -> None:
    """Somebody who only plays back what he heard cannot make a welcome."""
    real = Acceptor(TOKEN, "test")
    first = Dialer(TOKEN, "test", "n", 1)
    real.take_hello(first.answer(real.challenge()))
    recorded, _ = real.welcome("master", 1)
    second = Dialer(TOKEN, "test", "n", 1)
    second.answer(real.challenge())
    with pytest.raises(LinkRefused) as refusal:
        second.finish(recorded)
    assert refusal.value.reason == "bad_token"


def test_a_recorded_hello_does_not_open_another_link() -> None:
    first, second = Acceptor(TOKEN, "test"), Acceptor(TOKEN, "test")
    hello = Dialer(TOKEN, "test", "n", 1).answer(first.challenge())
    first.take_hello(hello)
    with pytest.raises(LinkRefused) as refusal:
        second.take_hello(hello)
    assert refusal.value.reason == "bad_token"


@pytest.mark.parametrize(
    "change", [{"node_id": "other"}, {"epoch": 2}, {"detail": b"forged"}, {"mac": b""}, {"purpose": "kv"}]
)
def test_every_field_of_a_hello_is_proved(change: dict[str, object]) -> None:
    acceptor = Acceptor(TOKEN, "test")
    frame = Dialer(TOKEN, "test", "n", 1).answer(acceptor.challenge())
    hello = msgspec.msgpack.decode(frame, type=cluster_link.Hello)
    with pytest.raises(LinkRefused) as refusal:
        acceptor.take_hello(msgspec.msgpack.encode(msgspec.structs.replace(hello, **change)))
    assert refusal.value.reason == "bad_token"


def test_links_of_different_purposes_do_not_mix() -> None:
    acceptor = Acceptor(TOKEN, "pd_register")
    with pytest.raises(LinkRefused) as refusal:
        acceptor.take_hello(Dialer(TOKEN, "kv", "n", 1).answer(acceptor.challenge()))
    assert refusal.value.reason == "bad_purpose"


def test_another_protocol_version_is_named() -> None:
    acceptor = Acceptor(TOKEN, "test")
    hello = Dialer(TOKEN, "test", "n", 1)
    hello._hello = msgspec.structs.replace(hello._hello, proto=99)
    with pytest.raises(LinkRefused, match="99") as refusal:
        acceptor.take_hello(hello.answer(acceptor.challenge()))
    assert refusal.value.reason == "bad_protocol"


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00",
        pickle.dumps({"a": print}),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["empty", "zeros", "tls", "pickle", "http"],
)
def test_junk_is_refused_on_both_sides(junk: bytes) -> None:
    with pytest.raises(LinkRefused):
        Acceptor(TOKEN, "test").take_hello(junk)
    with pytest.raises(LinkRefused):
        Dialer(TOKEN, "test", "n", 1).answer(junk)
    with pytest.raises(LinkRefused):
        Dialer(TOKEN, "test", "n", 1).finish(junk)


def test_a_refusal_carries_its_diff() -> None:
    acceptor = Acceptor(TOKEN, "test")
    dialer = Dialer(TOKEN, "test", "n", 1)
    acceptor.take_hello(dialer.answer(acceptor.challenge()))
    with pytest.raises(LinkRefused) as refusal:
        dialer.finish(
            acceptor.refuse("bad_layout", "does not fit", ("dtype: ours float32, theirs int8",)).frame
        )
    assert refusal.value.reason == "bad_layout"
    assert refusal.value.diff[0].startswith("dtype")


# ---------------------------------------------------------------- sealed frames


def test_a_frame_that_is_changed_repeated_lost_or_sent_back_is_found_out() -> None:
    ours, theirs = handshake()
    frames = [ours.seal(b"one"), ours.seal(b"two"), ours.seal(b"three")]
    changed = bytearray(frames[0])
    changed[-1] ^= 1
    for bad in (bytes(changed), frames[0][:-1], frames[0][:10], frames[1], b""):
        with pytest.raises(LinkBroken):
            theirs.open(bad)
    assert theirs.open(frames[0]) == b"one"
    with pytest.raises(LinkBroken, match="frame 0; 1 is the next"):
        theirs.open(frames[0])
    with pytest.raises(LinkBroken):
        theirs.open(frames[2])
    with pytest.raises(LinkBroken):
        ours.open(frames[0])


def test_frames_of_an_earlier_link_are_worthless() -> None:
    ours, _ = handshake()
    _, theirs = handshake()
    with pytest.raises(LinkBroken):
        theirs.open(ours.seal(b"old"))


def test_a_body_over_the_limit_is_not_sealed() -> None:
    ours, _ = handshake()
    with pytest.raises(ValueError, match=str(MAX_FRAME_BYTES)):
        ours.seal(bytes(MAX_FRAME_BYTES))


# ---------------------------------------------------------------- over a stream


def test_frames_come_whole_out_of_a_stream_cut_anywhere() -> None:
    frames = StreamFrames()
    data = b"".join(StreamFrames.wrap(body) for body in (b"", b"a", b"b" * 1000))
    found = []
    for i in range(len(data)):
        frames.feed(data[i : i + 1])
        while (frame := frames.next_frame()) is not None:
            found.append(frame)
    assert found == [b"", b"a", b"b" * 1000]


def test_a_stream_of_something_else_ends_at_once() -> None:
    frames = StreamFrames()
    frames.feed(b"GET / HTTP/1.1\r\n")
    with pytest.raises(LinkBroken, match="the limit is 65536"):
        frames.next_frame()


def test_the_handshake_over_a_real_socket() -> None:
    left, right = socket.socketpair()
    results: list[bytes] = []

    def receive(sock: socket.socket, frames: StreamFrames) -> bytes:
        while (frame := frames.next_frame()) is None:
            frames.feed(sock.recv(11))
        return frame

    def dial() -> None:
        frames = StreamFrames()
        dialer = Dialer(TOKEN, "kv", "p", new_epoch())
        right.sendall(StreamFrames.wrap(dialer.answer(receive(right, frames))))
        _, seal = dialer.finish(receive(right, frames))
        right.sendall(StreamFrames.wrap(seal.seal(b"ping")))
        results.append(seal.open(receive(right, frames)))

    thread = threading.Thread(target=dial)
    thread.start()
    frames = StreamFrames()
    acceptor = Acceptor(TOKEN, "kv")
    left.sendall(StreamFrames.wrap(acceptor.challenge()))
    acceptor.take_hello(receive(left, frames))
    welcome, seal = acceptor.welcome("d", new_epoch())
    left.sendall(StreamFrames.wrap(welcome))
    assert seal.open(receive(left, frames)) == b"ping"
    left.sendall(StreamFrames.wrap(seal.seal(b"pong")))
    thread.join(5)
    left.close()
    right.close()
    assert results == [b"pong"]


def test_a_signature_is_of_one_token_purpose_and_text() -> None:
    base = signature(TOKEN, "entry", b"ab", b"c")
    assert base == signature(TOKEN, "entry", b"ab", b"c")
    others = [
        (TOKEN + b"x", "entry", b"ab", b"c"),
        (TOKEN, "other", b"ab", b"c"),
        (TOKEN, "entry", b"a", b"bc"),
    ]
    assert base not in [signature(*arguments) for arguments in others]
