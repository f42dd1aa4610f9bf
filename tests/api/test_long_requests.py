"""Requests of many megabytes that compute nothing: other clients' tokens go on while they are answered."""

import asyncio
import threading
import time
from typing import Any

import pytest

from tests.api.harness import Asgi, run_asgi

TEXTS = [{"role": "user", "content": "hi"}]


async def longest_stop(app: Asgi, path: str, body: Any) -> float:
    """The longest time without a turn of the event loop, as a share of what the answer takes."""
    content = app.client.build_request("POST", path, json=body).content
    longest_s, began_s = 0.0, time.perf_counter()
    answering = asyncio.create_task(app.post(path, content))
    turned_s = began_s
    while not answering.done():
        await asyncio.sleep(0)
        now_s = time.perf_counter()
        longest_s, turned_s = max(longest_s, now_s - turned_s), now_s
    assert (await answering).status_code == 200
    return longest_s / (turned_s - began_s)


def test_naming_many_tokens_lets_others_go_on() -> None:
    async def test(app: Asgi) -> None:
        body = {"prompt": "ab" * 300_000, "return_token_strs": True}
        assert await longest_stop(app, "/tokenize", body) < 0.6
        names = (await app.post("/tokenize", {**body, "prompt": "abc" * 2000})).json()["token_strs"]
        assert names == ["a", "b", "c"] * 2000

    run_asgi(test)


def test_decoding_many_tokens_lets_others_go_on() -> None:
    async def test(app: Asgi) -> None:
        assert await longest_stop(app, "/detokenize", {"tokens": [97] * 2_000_000}) < 0.6
        assert (await app.post("/detokenize", {"tokens": [97, 256] * 2000})).json() == {
            "prompt": "a<eos>" * 2000
        }

    run_asgi(test)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("messages", "is_inline"),
    [
        (TEXTS, True),
        (TEXTS * 100, False),
        ([{"role": "user", "content": "hi" * 2000}], False),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], False),
        (
            [*TEXTS, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
            False,
        ),
    ],
    ids=["short", "many", "long", "parts", "tool calls"],
)
def test_only_short_conversations_are_written_between_tokens(
    path: str, messages: list[dict[str, Any]], is_inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(app: Asgi) -> None:
        threads = []
        render = app.context.tokenizer.apply_chat_template

        def noted(*args: Any, **kwargs: Any) -> str:
            threads.append(threading.current_thread())
            return render(*args, **kwargs)

        monkeypatch.setattr(app.context.tokenizer, "apply_chat_template", noted)
        assert (await app.post(path, {"messages": messages})).status_code in (200, 400)  # or too long
        assert [thread is threading.main_thread() for thread in threads] == [is_inline]

    run_asgi(test)
