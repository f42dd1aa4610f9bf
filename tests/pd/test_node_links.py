"""Who may register at a pd_master, and what becomes of those who may not."""

import asyncio
import os
import pickle
import time

import msgspec
import pytest

from lightllm.cluster_link import Dialer, LinkRefused, Seal, Welcome, new_epoch
from lightllm.cluster_messages import (
    REGISTER_PATH,
    REGISTER_PURPOSE,
    Beat,
    NodeRecord,
    NodeReport,
    Registration,
)
from lightllm.messages import (
    EngineInfo,
    EngineOutput,
    EngineStats,
    KVLayout,
    RequestOutput,
)
from lightllm.node_link import Dialling, Link
from lightllm.web_socket import WebSocket, WebSocketRefused, connect
from tests.pd.fake_node import LAYOUT
from tests.pd.harness import TOKEN, Cluster, run, until


class Owner:
    """A node that says what it is told to."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self.heard: list[bytes] = []
        self.closed: list[str] = []

    def on_open(self, link: Link, welcome: Welcome | None) -> None:
        self.link = link

    def on_body(self, link: Link, body: bytes) -> None:
        self.heard.append(body)

    def on_closed(self, link: Link, reason: str) -> None:
        self.link = None
        self.closed.append(reason)

    def heartbeat(self, link: Link) -> NodeReport:
        return NodeReport(stats=EngineStats())


def registration(
    name: str, *, layout: KVLayout = LAYOUT, epoch: int = 5, role: str = "decode"
) -> Registration:
    info = EngineInfo(
        device="fake",
        dtype="float32",
        kv_total_tokens=100,
        max_req_total_len=100,
        vocab_size=257,
        load_s=0.0,
        attention_backend="fake",
    )
    record = NodeRecord(node_id=name, epoch=epoch, role=role, address="x:1", layout=layout)
    return Registration(record=record, info=info)


def dial(
    cluster: Cluster, name: str, owner: Owner | None = None, *, token: str = TOKEN, **fields
) -> tuple[Owner, Dialling]:
    owner = owner or Owner()
    detail = msgspec.msgpack.encode(registration(name, **fields))
    epoch = fields.get("epoch", 5)

    def dialer() -> Dialer:
        return Dialer(token.encode(), REGISTER_PURPOSE, name, epoch, detail)

    return owner, Dialling("127.0.0.1", cluster.port, REGISTER_PATH, owner, dialer, "pd_master")


async def open_socket(cluster: Cluster) -> tuple[WebSocket, list[bytes], list[str]]:
    socket = await connect("127.0.0.1", cluster.port, REGISTER_PATH, 65536)
    heard: list[bytes] = []
    closed: list[str] = []
    socket.on_message, socket.on_closed = heard.append, closed.append
    return socket, heard, closed


@pytest.mark.parametrize(
    "junk",
    [b"\x00" * 40, b"\x16\x03\x01\x02\x00", pickle.dumps(os.getcwd), os.urandom(5000), bytes(70_000)],
    ids=["zeros", "tls", "pickle", "random", "oversize"],
)
def test_junk_instead_of_a_hello_closes_the_link_only(junk: bytes) -> None:
    async def test(cluster: Cluster) -> None:
        socket, _, closed = await open_socket(cluster)
        socket.send(junk)
        await until(lambda: bool(closed), 3)
        assert (await cluster.client.get("/health")).status_code == 200
        assert not cluster.router.directory.all()

    run(test)


def test_bytes_that_are_no_websocket_close_the_connection() -> None:
    async def test(cluster: Cluster) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", cluster.port)
        writer.write(
            b"GET /pd_register HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert b" 101 " in await reader.readline()
        writer.write(os.urandom(200) + b"\xff" * 200)
        await asyncio.wait_for(reader.read(), 5)  # to its end
        writer.close()
        assert (await cluster.client.get("/health")).status_code == 200

    run(test)


def test_only_this_path_has_websockets_and_only_for_those_who_ask() -> None:
    async def test(cluster: Cluster) -> None:
        with pytest.raises(WebSocketRefused, match="404"):
            await connect("127.0.0.1", cluster.port, "/elsewhere", 1000)
        reply = await cluster.client.get("/pd_register")
        assert reply.status_code == 404

    run(test)


def test_a_wrong_token_is_refused_with_the_remedy() -> None:
    async def test(cluster: Cluster) -> None:
        owner, dialling = dial(cluster, "liar", token="another token of enough bytes")
        await until(lambda: dialling.refusal is not None, 3)
        assert dialling.refusal is not None
        assert dialling.refusal.reason == "bad_token"
        assert "LIGHTLLM_CLUSTER_TOKEN" in dialling.state
        assert owner.link is None
        dialling.stop("done")

    run(test)


def test_a_model_that_does_not_fit_is_refused_with_a_diff_on_both_sides() -> None:
    async def test(cluster: Cluster) -> None:
        good, first = dial(cluster, "good")
        await cluster.wait_for("good")
        other = msgspec.structs.replace(LAYOUT, dtype="bfloat16", num_layers=2)
        _, second = dial(cluster, "bad", layout=other)
        await until(lambda: second.refusal is not None, 3)
        assert second.refusal is not None
        assert second.refusal.diff == ("num_layers: ours 1, theirs 2", "dtype: ours float32, theirs bfloat16")
        page = (await cluster.client.get("/cluster", headers={"accept": "application/json"})).json()
        assert page["refused"][0]["node"] == "bad"
        assert page["refused"][0]["diff"] == list(second.refusal.diff)
        first.stop("gone")  # the last node of the first layout: it is forgotten with it
        await cluster.wait_for("bad")
        second.stop("done")
        assert good.closed

    run(test)


def test_nodes_of_one_model_may_have_different_numbers_of_ranks() -> None:
    async def test(cluster: Cluster) -> None:
        _, one = dial(cluster, "one rank")
        _, four = dial(cluster, "four", layout=msgspec.structs.replace(LAYOUT, tp_size=4), role="prefill")
        await cluster.wait_for("one rank", "four")
        for dialling in (one, four):
            dialling.stop("done")

    run(test)


def test_a_new_registration_of_a_node_replaces_the_old_one() -> None:
    async def test(cluster: Cluster) -> None:
        first_owner, first = dial(cluster, "twin")
        await cluster.wait_for("twin")
        first._task.cancel()  # it shall not come back
        second_owner, second = dial(cluster, "twin", epoch=6)
        await until(lambda: bool(first_owner.closed))
        node = cluster.router.directory.get("twin")
        assert node is not None
        assert node.record.epoch == 6
        assert second_owner.link is not None
        second.stop("done")

    run(test)


def test_a_forged_registration_of_a_node_that_is_here_changes_nothing() -> None:
    async def test(cluster: Cluster) -> None:
        victim, first = dial(cluster, "victim")
        await cluster.wait_for("victim")
        node = cluster.router.directory.get("victim")
        _, forger = dial(cluster, "victim", token="another token of enough bytes", epoch=6)
        await until(lambda: forger.refusal is not None, 3)
        forger.stop("seen")
        assert cluster.router.directory.get("victim") is node
        assert victim.link is not None
        assert not victim.closed
        first.stop("done")

    run(test)


def test_a_storm_of_registrations_leaves_one_node() -> None:
    async def test(cluster: Cluster) -> None:
        pairs = [dial(cluster, "storm", epoch=new_epoch()) for _ in range(50)]
        await until(lambda: sum(bool(owner.closed) for owner, _ in pairs) >= 20)
        for _, dialling in pairs[1:]:
            dialling.stop("enough")
        await asyncio.sleep(0.3)
        assert len(cluster.router.directory) <= 1
        assert (await cluster.client.get("/health")).status_code == 200
        pairs[0][1].stop("done")

    run(test)


def test_a_node_that_breaks_the_protocol_loses_its_link() -> None:
    async def test(cluster: Cluster) -> None:
        for message in (
            msgspec.msgpack.encode({"type": "EngineOutput", "outputs": []}),
            msgspec.msgpack.encode({"type": "Unknown"}),
            b"\xc1",
        ):
            owner, dialling = dial(cluster, "odd")
            await until(lambda owner=owner: owner.link is not None)
            assert owner.link is not None
            seal = owner.link._seal
            assert isinstance(seal, Seal)
            owner.link.socket.send(seal.seal(message))
            await until(lambda owner=owner: bool(owner.closed), 3)
            dialling.stop("done")

    run(test)


def test_outputs_for_requests_that_a_node_does_not_have_are_dropped() -> None:
    async def test(cluster: Cluster) -> None:
        cluster.start("decode", "d1")
        await cluster.wait_for("d1")
        owner, dialling = dial(cluster, "forger", role="prefill")
        await cluster.wait_for("d1", "forger")
        dialled = asyncio.create_task(cluster.generate("forged", 60))
        await until(lambda: bool(cluster.router._legs))
        assert owner.link is not None
        for leg_id in list(cluster.router._legs):
            output = RequestOutput(request_id=leg_id, new_token_ids=[63], finish_reason="stop")
            if cluster.router._legs[leg_id].node.node_id != "forger":
                owner.link.send(EngineOutput(outputs=[output], stats=EngineStats()))
        await asyncio.sleep(0.1)
        dialling.stop("done")  # what was routed to it goes on elsewhere
        assert "?" not in (await dialled).json()["generated_text"][0]

    run(test)


def test_a_silent_node_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(cluster: Cluster) -> None:
        owner, dialling = dial(cluster, "silent")
        await cluster.wait_for("silent")
        assert owner.link is not None
        owner.link._timer.cancel()  # no heartbeat any more
        start = time.monotonic()
        await until(lambda: not cluster.router.directory.all())
        assert 5 < time.monotonic() - start < 10
        dialling.stop("done")

    run(test)


def test_a_caller_that_hears_nothing_yet_stops_nobody() -> None:
    """The challenge comes in one piece with the answer to the upgrade, and nobody has asked for it."""

    async def test(cluster: Cluster) -> None:
        sockets = [await connect("127.0.0.1", cluster.port, REGISTER_PATH, 65536) for _ in range(20)]
        await asyncio.sleep(0.1)
        assert (await cluster.client.get("/health")).status_code == 200
        for socket in sockets:
            socket.abort("done")

    run(test)


def test_a_node_that_has_nothing_to_offer_dials_again() -> None:
    async def test(cluster: Cluster) -> None:
        faults = ["the engine hangs"] * 3
        detail = msgspec.msgpack.encode(registration("late"))

        def dialer() -> Dialer:
            if faults:
                raise TimeoutError(faults.pop())
            return Dialer(TOKEN.encode(), REGISTER_PURPOSE, "late", 5, detail)

        dialling = Dialling("127.0.0.1", cluster.port, REGISTER_PATH, Owner(), dialer, "pd_master")
        await until(lambda: "the engine hangs" in dialling.state)
        await cluster.wait_for("late")
        dialling.stop("done")

    run(test)


def test_a_master_speaks_first_and_only_a_real_one_is_believed() -> None:
    async def test(cluster: Cluster) -> None:
        socket, heard, _ = await open_socket(cluster)
        await until(lambda: bool(heard), 3)
        with pytest.raises(LinkRefused):
            Dialer(b"x" * 32, REGISTER_PURPOSE, "n", 1).finish(heard[0])
        socket.close("done")
        assert msgspec.msgpack.encode(Beat())

    run(test)
