"""config_servers over a real etcd: they show one list, and neither they nor the etcd need to stay up."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from lightllm.config_server.etcd import EtcdClient, EtcdUnavailable
from lightllm.config_server.etcd_store import EtcdStore
from lightllm.config_server.store import make_store
from lightllm.errors import ConfigError
from tests.pd.directories import directory, entry, watch
from tests.pd.etcd import Etcd, free_port, needs_etcd
from tests.pd.harness import TOKEN, until

ONE, TWO, THREE = (("10.0.0.1", port) for port in (1, 2, 3))
LEASE_S, TURN_S = 2, 0.5


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    found = Etcd(tmp_path)
    yield found
    found.kill()


def store(etcd: Etcd, token: str = TOKEN, *, lease_s: int = LEASE_S, turn_s: float = TURN_S) -> EtcdStore:
    client = EtcdClient([("127.0.0.1", etcd.port)])
    return EtcdStore(client, token.encode(), lease_s=lease_s, turn_s=turn_s)


def shows(lists: list[set[tuple[str, int]]], *masters: tuple[str, int]) -> Callable[[], bool]:
    return lambda: bool(lists) and lists[-1] == set(masters)


@contextlib.asynccontextmanager
async def pair(etcd: Etcd, **times: float) -> AsyncIterator[tuple[int, int]]:
    """Two config_servers over one etcd; yields their ports."""
    one_store, two_store = store(etcd, **times), store(etcd, **times)  # type: ignore[arg-type]
    async with directory(store=one_store) as one, directory(store=two_store) as two:
        yield one, two


@needs_etcd
def test_nodes_find_all_masters_whichever_config_server_they_ask(etcd: Etcd) -> None:
    async def test() -> None:
        # So slow that only the watch can bring news in time.
        async with pair(etcd, lease_s=60, turn_s=20) as (one, two):
            (here, lists), (there, other_lists) = watch(one), watch(two)
            await until(lambda: bool(lists and other_lists))
            masters = [entry(one, "one", 1), entry(two, "two", 2)]
            await until(shows(lists, ONE, TWO))
            await until(shows(other_lists, ONE, TWO))
            masters[0].stop()
            await until(shows(other_lists, TWO))
            late, late_lists = watch(one)
            await until(lambda: bool(late_lists))
            assert late_lists[0] == {TWO}
            for thing in (here, there, late, masters[1]):
                thing.stop()

    asyncio.run(test())


@needs_etcd
def test_what_a_killed_config_server_has_listed_stays_for_its_lease(etcd: Etcd) -> None:
    async def test() -> None:
        async with directory(store=store(etcd)) as two:
            watcher, lists = watch(two)
            async with directory(store=store(etcd)) as one:
                masters = [entry(one, "one", 1), entry(one, "two", 2)]
                await until(shows(lists, ONE, TWO))
            begun, seen = time.monotonic(), len(lists)
            # One of its masters finds another config_server.
            masters[0].stop()
            masters[0] = entry(two, "one", 1, epoch=2)
            await until(shows(lists, ONE))
            assert LEASE_S / 2 < time.monotonic() - begun < 2 * LEASE_S + 2
            assert all(ONE in shown for shown in lists[seen:])
            await asyncio.sleep(LEASE_S + TURN_S)
            assert lists[-1] == {ONE}  # its own lease is renewed
            for thing in (*masters, watcher):
                thing.stop()

    asyncio.run(test())


@needs_etcd
@pytest.mark.parametrize("is_lost", [False, True], ids=["data kept", "data lost"])
def test_an_etcd_may_be_away_and_come_back(etcd: Etcd, is_lost: bool) -> None:
    async def test() -> None:
        async with pair(etcd) as (one, two):
            masters = [entry(one, "one", 1), entry(two, "two", 2)]
            (here, lists), (there, other_lists) = watch(one), watch(two)
            await until(shows(lists, ONE, TWO))
            await until(shows(other_lists, ONE, TWO))
            etcd.kill()
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{one}") as client:
                await says(client, "/health", 503)
                reply = (await client.get("/health")).json()
                assert reply["error"]["code"] == "store_down"
                assert str(etcd.port) in reply["message"]
                for path in ("/readiness", "/liveness"):
                    assert (await client.get(path)).status_code == 200
                # The last list stays in force; who is linked here is known here at once.
                masters.append(entry(one, "three", 3))
                await until(shows(lists, ONE, TWO, THREE))
                masters[0].stop()
                await until(shows(lists, TWO, THREE))
                assert other_lists[-1] == {ONE, TWO}
                if is_lost:
                    etcd.lose_data()
                await asyncio.to_thread(etcd.start)
                await until(shows(other_lists, TWO, THREE))
                await until(shows(lists, TWO, THREE))
                await says(client, "/health", 200)
            for thing in (here, there, *masters):
                thing.stop()

    asyncio.run(test())


async def says(client: httpx.AsyncClient, path: str, status: int) -> None:
    end = time.monotonic() + 12
    while (await client.get(path)).status_code != status:
        assert time.monotonic() < end, "did not happen in time"
        await asyncio.sleep(0.05)


@needs_etcd
def test_the_end_of_an_earlier_life_does_not_end_a_later_one_elsewhere(etcd: Etcd) -> None:
    async def test() -> None:
        async with pair(etcd) as (one, two):
            watcher, lists = watch(two)
            old = entry(one, "one", 1)
            await until(shows(lists, ONE))
            new = entry(two, "one", 2, epoch=2)
            await until(shows(lists, TWO))
            old.stop()
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{one}") as client:
                end = time.monotonic() + 10
                while [m["port"] for m in (await client.get("/pd_masters")).json()["pd_masters"]] != [2]:
                    assert time.monotonic() < end
                    await asyncio.sleep(0.05)
            await asyncio.sleep(2 * TURN_S)
            assert lists[-1] == {TWO}
            new.stop()
            watcher.stop()

    asyncio.run(test())


@needs_etcd
def test_what_others_write_is_not_believed(etcd: Etcd, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        liar = EtcdClient([("127.0.0.1", etcd.port)])
        foreign = store(etcd, "the token of another cluster")
        async with directory(store=foreign) as there, directory(store=store(etcd)) as here:
            stranger, ours = entry(there, "stranger", 7), entry(here, "one", 1)
            watcher, lists = watch(here)
            await until(shows(lists, ONE))
            [key] = [key for key in await liar.read(b"/lightllm/") if key.endswith(b"/one")]
            [(_, theirs)] = [pair for pair in (await liar.read(b"/lightllm/")).items() if pair[0] != key]
            lease = await liar.grant(60)
            value = (await liar.read(key))[key]
            for name, forged in ((b"two", value), (b"three", b"{}"), (b"stranger", theirs)):
                assert await liar.write(key[: -len(b"one")] + name, forged, lease)
            await until(lambda: len(caplog.records) >= 3 and "stranger" in caplog.text)
            assert all(shown <= {ONE} for shown in lists)
            await liar.close()
            for thing in (stranger, ours, watcher):
                thing.stop()

    with caplog.at_level("WARNING", logger="lightllm.config_server.etcd_store"):
        asyncio.run(test())
    assert len([record for record in caplog.records if "ignored" in record.message]) == 3


@needs_etcd
def test_one_member_of_several_is_enough(etcd: Etcd) -> None:
    async def test() -> None:
        client = EtcdClient([("127.0.0.1", free_port()), ("127.0.0.1", etcd.port)])
        lease = await client.grant(10)
        assert await client.write(b"/a/1", b"x", lease)
        assert await client.read(b"/a/") == {b"/a/1": b"x"}
        assert await client.renew(lease)
        await client.delete(b"/a/1", "1")  # not of that lease
        assert await client.read(b"/a/") == {b"/a/1": b"x"}
        await client.delete(b"/a/1", lease)
        assert await client.read(b"/a/") == {}
        assert not await client.renew("12345")
        assert not await client.write(b"/a/1", b"x", "12345")
        await client.close()

    asyncio.run(test())


def test_what_is_no_etcd_is_said() -> None:
    async def test() -> None:
        async with directory() as port:  # an HTTP server, but none of etcd's
            closed = free_port()
            client = EtcdClient([("127.0.0.1", closed), ("127.0.0.1", port)])
            with pytest.raises(EtcdUnavailable) as caught:
                await client.read(b"/a/")
            assert f"127.0.0.1:{closed}: All connection attempts failed" in str(caught.value)
            assert f"127.0.0.1:{port}: it answers HTTP 404, but not as an etcd does" in str(caught.value)
            await client.close()

    asyncio.run(test())


def test_a_wrong_address_ends_the_start(tmp_path: Path) -> None:
    named = f"etcd://127.0.0.1:{free_port()}"
    flags = {
        "run_mode": "config_server",
        "config_server_host": "127.0.0.1",
        "config_server_port": str(free_port()),
        "config_server_store": named,
    }
    done = subprocess.run(
        [sys.executable, "-m", "lightllm.server.api_server", *(f"--{k}={v}" for k, v in flags.items())],
        env={**os.environ, "LIGHTLLM_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert f"--config_server_store {named}: no etcd answers there" in last
    assert "correct the address" in last


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("etcd", "etcd_store"):
        monkeypatch.delitem(sys.modules, f"lightllm.config_server.{name}")
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ConfigError, match=r"httpx, which is not installed: pip install 'lightllm\[etcd\]'"):
        make_store("etcd://127.0.0.1:2379", TOKEN.encode())
