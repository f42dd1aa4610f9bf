"""ChatTemplate: a model's Jinja template, compiled once and rendered in a sandbox with limits.

The template comes from the model's folder and its data from clients; neither may run code, hang or fill
memory: no attribute outside the sandbox, a deadline in every loop turn, bounds on the text and on what `+`,
`~` and `*` make. One call into C (a filter over a large list, say) is not interrupted. Runs in the frontend
process; knows no tokenizer and no HTTP.
"""

import datetime
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor
import msgspec

from lightllm.errors import ModelLoadError, RequestError

RENDER_LIMIT_S = 2.0
MAX_TEXT_CHARS = 64 * 1024 * 1024
MAX_POWER_BASE = 1 << 32
MAX_POWER_EXPONENT = 64
_TICK = "_lightllm_tick"
_JOIN = "_lightllm_join"


class ChatTemplate:
    """One compiled template. Rendering is thread-safe.

    Args:
        source: the Jinja text.
        origin: where it comes from, for messages.
        constants: variables it may use besides the messages, as bos_token and eos_token.

    Raises:
        ModelLoadError: the source is no valid template.
    """

    def __init__(self, source: str, origin: str, constants: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._constants = dict(constants or {})
        environment = _Environment()
        try:
            self._template = environment.from_string(source)
            self._variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"{origin}: not a valid chat template: {error}") from error

    def uses(self, variable: str) -> bool:
        """Whether the template looks at a variable, as `tools` or `reasoning_effort`."""
        return variable in self._variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        limit_s: float = RENDER_LIMIT_S,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: as in the chat API: role, content (text or list of text parts), tool_calls ...
            continue_final_message: leave the last message open, so that the model goes on with it.
            variables: further variables of the template, as enable_thinking.

        Raises:
            RequestError: the template refuses these messages, or takes too long or writes too much.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message: not together with add_generation_prompt")
        plain = flatten_messages(messages)
        values = {
            **self._constants,
            **variables,
            "messages": plain,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(values, limit_s)
        return _reopen_final_message(text, plain) if continue_final_message else text

    def _run(self, values: dict[str, Any], limit_s: float) -> str:
        deadline = time.monotonic() + limit_s

        def tick() -> None:
            if time.monotonic() > deadline:
                raise RequestError(f"chat template: takes longer than {limit_s} s for these messages")

        pieces, size = [], 0
        try:
            for piece in self._template.generate(values, **{_TICK: tick, _JOIN: _join}):
                tick()
                pieces.append(piece)
                size += len(piece)
                if size > MAX_TEXT_CHARS:
                    raise RequestError(f"chat template: writes more than {MAX_TEXT_CHARS} characters")
        except jinja2.TemplateError as error:
            raise RequestError(f"chat template: refuses these messages: {error.message or error}") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            # What a template trips over when a message lacks what it expects.
            raise RequestError(f"chat template: cannot write these messages: {error}") from error
        return "".join(pieces)


def flatten_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form that templates expect.

    Text parts are joined by newlines, a missing content is empty, developer is system, and the arguments of
    tool calls are objects rather than JSON text.

    Raises:
        RequestError: a part is not text, or arguments are no JSON object; `param` names it.
    """
    plain = []
    for i, message in enumerate(messages):
        flat = {**message, "content": _flat_content(message.get("content"), f"messages[{i}].content")}
        if message.get("role") == "developer":
            flat["role"] = "system"
        if message.get("tool_calls"):
            calls = message["tool_calls"]
            flat["tool_calls"] = [
                _flat_call(c, f"messages[{i}].tool_calls[{j}]") for j, c in enumerate(calls)
            ]
        plain.append(flat)
    return plain


def _flat_content(content: Any, param: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"{param}: got {type(content).__name__}, expected text or a list of parts", param=param
        )
    for j, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f'{param}[{j}]: only parts like {{"type": "text", "text": "..."}} are supported',
                code="not_supported",
                param=f"{param}[{j}]",
            )
    return "\n".join(part["text"] for part in content)


def _flat_call(call: Any, param: str) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    param = f"{param}.function.arguments"
    try:
        arguments = msgspec.json.decode(function["arguments"] or "{}", type=dict[str, Any])
    except ValueError as error:
        raise RequestError(f"{param}: expected the text of a JSON object: {error}", param=param) from error
    return {**call, "function": {**function, "arguments": arguments}}


def _reopen_final_message(text: str, messages: list[dict[str, Any]]) -> str:
    """Cut what the template writes behind the last message's text."""
    final = messages[-1]["content"].strip() if messages else ""
    start = text.rfind(final) if final else -1
    if start < 0:
        raise RequestError("continue_final_message: the last message has no text that could be continued")
    return text[: start + len(final)]


def read_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template of an HF folder: chat_template.jinja, tokenizer_config.json, chat_template.json, or None.

    Where a config names several templates, the one called `default` counts.

    Raises:
        ModelLoadError: a file cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_template_file(path)
    source = tokenizer_config.get("chat_template")
    path = folder / "chat_template.json"
    if source is None and path.exists():  # of multimodal models
        try:
            source = msgspec.json.decode(path.read_bytes(), type=dict[str, Any]).get("chat_template")
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path}: not a readable JSON object: {error}") from error
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) and source else None


def read_template_file(path: Path) -> str:
    """The text of a Jinja file.

    Raises:
        ModelLoadError: it is missing or not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path}: chat template cannot be read: {error}") from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is simply written."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Guards(jinja2.visitor.NodeTransformer):
    """Rewrite a parsed template: every loop turn calls _TICK, and `a ~ b` becomes _JOIN(a, b)."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.For:
        self.generic_visit(node)
        tick = jinja2.nodes.Call(jinja2.nodes.Name(_TICK, "load"), [], [], None, None, lineno=node.lineno)
        node.body.insert(0, jinja2.nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Call:
        self.generic_visit(node)
        return jinja2.nodes.Call(
            jinja2.nodes.Name(_JOIN, "load"), node.nodes, [], None, None, lineno=node.lineno
        )


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """HF's dialect of Jinja, with guards against templates without end."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _generate(
        self, source: jinja2.nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        return super()._generate(_Guards().visit(source), name, filename, defer_init)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            is_large = abs(left) > MAX_POWER_BASE or abs(right) > MAX_POWER_EXPONENT
        elif operator == "+":
            is_large = _size(left) + _size(right) > MAX_TEXT_CHARS
        else:
            is_large = max(_size(left) * _count(right), _size(right) * _count(left)) > MAX_TEXT_CHARS
        if is_large:
            raise jinja2.TemplateRuntimeError(f"computes too large a value with {operator}")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _join(*values: Any) -> str:
    texts = [str(value) for value in values]
    if sum(map(len, texts)) > MAX_TEXT_CHARS:
        raise jinja2.TemplateRuntimeError(f"makes a text of more than {MAX_TEXT_CHARS} characters")
    return "".join(texts)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """HF's tojson: plain JSON, without the HTML escapes of Jinja's own."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateRuntimeError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
