"""The directory of pd_masters over real sockets: listed while alive, followed at once, harmless restarts."""

import asyncio
import os
import pickle

import httpx
import pytest

from lightllm.cluster_messages import MASTER_PATH, WATCH_PATH
from lightllm.web_socket import connect
from tests.pd.directories import directory, entry, watch
from tests.pd.harness import TOKEN, until


def test_masters_come_and_go_and_watchers_hear_of_it_at_once() -> None:
    async def test() -> None:
        async with directory() as port:
            watcher, lists = watch(port)
            await until(lambda: lists == [set()])
            one, two = entry(port, "one", 1), entry(port, "two", 2)
            await until(lambda: lists[-1] == {("10.0.0.1", 1), ("10.0.0.1", 2)})
            one.stop()
            await until(lambda: lists[-1] == {("10.0.0.1", 2)})
            late, its_lists = watch(port)
            await until(lambda: its_lists == [{("10.0.0.1", 2)}])
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                shown = (await client.get("/pd_masters")).json()
                assert shown["version"] == 3
                assert [(m["node_id"], m["host"], m["port"]) for m in shown["pd_masters"]] == [
                    ("two", "10.0.0.1", 2)
                ]
            for thing in (two, watcher, late):
                thing.stop()

    asyncio.run(test())


def test_it_may_restart_and_the_list_comes_back() -> None:
    async def test() -> None:
        async with directory() as port:
            one = entry(port, "one", 1)
            watcher, lists = watch(port)
            await until(lambda: bool(lists) and lists[-1] == {("10.0.0.1", 1)})
        lists.clear()
        async with directory(port):
            await until(lambda: bool(lists) and lists[-1] == {("10.0.0.1", 1)})
            one.stop()
            watcher.stop()

    asyncio.run(test())


def test_a_new_life_of_a_master_replaces_the_old_one() -> None:
    async def test() -> None:
        async with directory() as port:
            watcher, lists = watch(port)
            old = entry(port, "one", 1)
            await until(lambda: bool(lists) and lists[-1] == {("10.0.0.1", 1)})
            old._dialling._task.cancel()  # it will not come back
            new = entry(port, "one", 2, epoch=2)
            await until(lambda: lists[-1] == {("10.0.0.1", 2)})
            await asyncio.sleep(0.1)
            assert lists[-1] == {("10.0.0.1", 2)}
            new.stop()
            watcher.stop()

    asyncio.run(test())


def test_the_list_needs_a_key_where_there_is_one_and_links_need_the_token() -> None:
    async def test() -> None:
        async with directory(key="a key") as port:
            liar = entry(port, "liar", 6, token="quite another token")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                assert (await client.get("/health")).json() == {"message": "Ok"}
                for secret, status in (("", 401), ("wrong", 401), ("a key", 200), (TOKEN, 200)):
                    headers = {"authorization": f"Bearer {secret}"} if secret else {}
                    assert (await client.get("/pd_masters", headers=headers)).status_code == status
                assert (await client.post("/pd_masters")).status_code == 405
                assert (await client.get("/generate")).status_code == 404
                await until(lambda: liar._dialling.refusal is not None)
                headers = {"authorization": "Bearer a key"}
                assert (await client.get("/pd_masters", headers=headers)).json()["pd_masters"] == []
            liar.stop()

    asyncio.run(test())


@pytest.mark.parametrize("path", [MASTER_PATH, WATCH_PATH])
@pytest.mark.parametrize(
    "junk",
    [b"\x00" * 40, b"\x16\x03\x01\x02\x00", pickle.dumps(os.getcwd), os.urandom(5000), bytes(70_000)],
    ids=["zeros", "tls", "pickle", "random", "oversize"],
)
def test_strangers_are_hung_up_on_and_harm_nobody(path: str, junk: bytes) -> None:
    async def test() -> None:
        async with directory() as port:
            one = entry(port, "one", 1)
            watcher, lists = watch(port)
            await until(lambda: bool(lists) and lists[-1] == {("10.0.0.1", 1)})
            stranger = await connect("127.0.0.1", port, path, 65536)
            closed: list[str] = []
            stranger.on_closed = closed.append
            stranger.send(junk)
            await until(lambda: bool(closed), 3)
            two = entry(port, "two", 2)
            await until(lambda: lists[-1] == {("10.0.0.1", 1), ("10.0.0.1", 2)})
            for thing in (one, two, watcher):
                thing.stop()

    asyncio.run(test())
