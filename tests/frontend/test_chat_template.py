"""Chat templates: the default model's, HF's dialect, and what template and data must not be able to do."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightllm.errors import ModelLoadError, RequestError
from lightllm.frontend.chat_template import ChatTemplate, flatten_messages, read_chat_template
from lightllm.frontend.tokenizer import Tokenizer
from lightllm.server.model_files import locate_model
from lightllm.weights.gguf import GGUFReader

SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def default() -> Tokenizer:
    return Tokenizer.from_gguf(GGUFReader(locate_model().path).metadata)


def template(source: str, **constants: str) -> ChatTemplate:
    return ChatTemplate(source, "test", constants)


def test_default_model(default: Tokenizer) -> None:
    assert default.has_chat_template
    asked = "<|im_start|>user\nHi<|im_end|>\n"
    assert default.apply_chat_template([USER]) == SYSTEM + asked + "<|im_start|>assistant\n"
    assert default.apply_chat_template([USER], add_generation_prompt=False) == SYSTEM + asked
    with_system = [{"role": "system", "content": "Be brief."}, USER]
    assert default.apply_chat_template(with_system, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + asked
    )


def test_default_model_continues_the_last_message(default: Tokenizer) -> None:
    messages = [USER, {"role": "assistant", "content": "Hi, I am"}]
    text = default.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nHi, I am")
    with pytest.raises(RequestError, match="not together"):
        default.apply_chat_template(messages, continue_final_message=True)


def test_parts_are_joined_by_newlines(default: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert default.apply_chat_template([{"role": "user", "content": parts}]) == default.apply_chat_template(
        [{"role": "user", "content": "a\nb"}]
    )


def test_flattening() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    flat = flatten_messages(messages)
    assert flat[0] == {"role": "system", "content": "d"}
    assert flat[1]["content"] == ""
    assert flat[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert messages[0]["role"] == "developer", "the caller's messages were changed"


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (5, "messages[0].content"),
        ([{"type": "image_url", "image_url": {}}], "messages[0].content[0]"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": 1}], "messages[0].content[1]"),
        (["a"], "messages[0].content[0]"),
    ],
)
def test_parts_that_are_not_text(content: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        flatten_messages([{"role": "user", "content": content}])
    assert caught.value.param == param
    assert caught.value.kind.status == 400


@pytest.mark.parametrize("arguments", ["{", "[1]", "null"])
def test_malformed_arguments_in_history(arguments: str) -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    with pytest.raises(RequestError) as caught:
        flatten_messages([message])
    assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


def test_dialect_of_hf() -> None:
    assert template("{% if true %}\n  a\n{% endif %}\nb\n").render([]) == "  a\nb"
    assert (
        template("{% for m in [1,2,3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}").render([])
        == "1"
    )
    assert template("{{ x | tojson }}").render([], x={"a": "<\u00e9>"}) == '{"a": "<\u00e9>"}'
    assert json.loads(template("{{ tools | tojson(indent=2) }}").render([], tools=[{"a": 1}])) == [{"a": 1}]
    assert template("{% generation %}a{% endgeneration %}b").render([]) == "ab"
    assert template("{{ strftime_now('%Y') }}").render([]) == time.strftime("%Y")
    assert template("{{ bos_token }}{{ messages[0].role }}", bos_token="<s>").render([USER]) == "<s>user"
    assert template("{{ tools is none }}{{ documents is none }}").render([]) == "TrueTrue"


def test_uses() -> None:
    source = "{% if tools %}{{ tools }}{% endif %}{{ enable_thinking }}"
    assert template(source).uses("tools")
    assert template(source).uses("enable_thinking")
    assert not template(source).uses("reasoning_effort")


def test_template_refuses_messages_as_a_request_error() -> None:
    refusing = template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        refusing.render([USER])
    assert caught.value.kind.status == 400


@pytest.mark.parametrize(
    "source", ["{{ messages[5].role.x }}", "{{ 'a' + 1 }}", "{{ 1 / 0 }}", "{{ messages | first + 1 }}"]
)
def test_what_a_template_trips_over_is_a_request_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        template(source).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(RequestError, match="refuses these messages"):
        template(source).render([USER])


@pytest.mark.parametrize(
    "source",
    ["{{ messages.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ '{0.__class__}'.format(1) }}"],
)
def test_hidden_attributes_are_empty(source: str) -> None:
    assert template(source).render([USER]) == ""


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) if a > 5 %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
        "{% macro m() %}{% for a in range(99999) %}{{ m() }}{% endfor %}{% endmacro %}{{ m() }}",
        "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for a in range(999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for a in range(999) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for a in range(999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ range(10 ** 9) }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 10 ** 10 ** 10 }}",
    ],
)
def test_templates_that_would_hang_or_fill_memory_are_stopped(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(RequestError, match="chat template"):
        template(source).render([USER], limit_s=0.3)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{% for x in y %}", "{% unknown %}"])
def test_invalid_templates_fail_at_load(source: str) -> None:
    with pytest.raises(ModelLoadError, match="test: not a valid chat template"):
        template(source)


@given(st.text(max_size=40))
def test_text_of_clients_is_never_run(text: str) -> None:
    source = template("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    for content in (text, "{{ 7 * 7 }}" + text, "{% raw %}" + text):
        assert source.render([{"role": "user", "content": content}]) == f"[{content}]"


def test_where_a_folder_keeps_its_template(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path, {}) is None
    assert read_chat_template(tmp_path, {"chat_template": "a"}) == "a"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert read_chat_template(tmp_path, {"chat_template": named}) == "d"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "multimodal"}')
    assert read_chat_template(tmp_path, {}) == "multimodal"
    assert read_chat_template(tmp_path, {"chat_template": "a"}) == "a"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_chat_template(tmp_path, {"chat_template": "a"}) == "file"


def test_damaged_template_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text("[")
    with pytest.raises(ModelLoadError, match=r"chat_template\.json"):
        read_chat_template(tmp_path, {})
