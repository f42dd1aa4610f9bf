"""Logprobs and stream chunks of the OpenAI API. Pure assembly: tokens in, bytes and structs out."""

from collections.abc import Callable, Sequence

import msgspec

from lightllm.api.errors import envelope_members
from lightllm.api.openai import AnswerHead
from lightllm.api.openai_types import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from lightllm.errors import LightLLMError
from lightllm.frontend.detokenizer import DetokenizerFactory
from lightllm.messages import TokenLogprobs

MIN_LOGPROB = -9999.0


def finite(logprob: float) -> float:
    """Six decimals; minus infinity, which JSON does not have, as -9999.0."""
    return round(logprob, 6) if logprob > MIN_LOGPROB else MIN_LOGPROB


class CompletionTokens:
    """Gathers the logprobs of one completions choice; `take` hands over what has come since.

    Args:
        texts: gives a token's text.
        num_top: alternatives per token that the client asked for.
    """

    def __init__(self, texts: DetokenizerFactory, num_top: int) -> None:
        self._texts = texts
        self._num_top = num_top
        self._columns = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])

    def add(self, token_id: int, entry: TokenLogprobs | None, offset: int) -> None:
        """Append one token; no entry for the first token of a prompt."""
        columns = self._columns
        text = self._texts.token_text(token_id)
        columns.tokens.append(text)
        columns.token_logprobs.append(None if entry is None else finite(entry.logprob))
        columns.top_logprobs.append(None if entry is None else self._top(text, entry))
        columns.text_offset.append(offset)

    def take(self) -> CompletionLogprobs:
        """Everything added since the last call."""
        columns = self._columns
        self._columns = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        return columns

    def _top(self, text: str, entry: TokenLogprobs) -> dict[str, float]:
        pairs = zip(entry.top_ids[: self._num_top], entry.top_logprobs, strict=False)
        top = {self._texts.token_text(token_id): finite(logprob) for token_id, logprob in pairs}
        if self._num_top:
            top.setdefault(text, finite(entry.logprob))
        return top

    def add_prompt(
        self, prompt: Sequence[int], entries: Sequence[TokenLogprobs | None], *, skip_special_tokens: bool
    ) -> None:
        """Append the tokens of a prompt at their places in its text, in which special ones may have none."""
        detokenizer = self._texts.new(skip_special_tokens=skip_special_tokens)
        for token_id, entry in zip(prompt, entries, strict=True):
            self.add(token_id, entry, detokenizer.num_chars)
            detokenizer.push(token_id)


class ChatTokens:
    """Gathers the logprobs of one chat choice; `take` hands over what has come since."""

    def __init__(self, texts: DetokenizerFactory, num_top: int) -> None:
        self._texts = texts
        self._num_top = num_top
        self._content: list[TokenLogprob] = []

    def add(self, token_id: int, entry: TokenLogprobs | None) -> None:
        """Append one token."""
        if entry is None:
            return
        pairs = zip(entry.top_ids[: self._num_top], entry.top_logprobs, strict=False)
        text, data = self._named(token_id)
        top = []
        for top_id, logprob in pairs:
            top_text, top_data = self._named(top_id)
            top.append(TopLogprob(token=top_text, logprob=finite(logprob), bytes=top_data))
        self._content.append(
            TokenLogprob(token=text, logprob=finite(entry.logprob), bytes=data, top_logprobs=top)
        )

    def take(self) -> ChatLogprobs:
        """Everything added since the last call."""
        content, self._content = self._content, []
        return ChatLogprobs(content=content)

    def _named(self, token_id: int) -> tuple[str, list[int]]:
        return self._texts.token_text(token_id), list(self._texts.token_bytes(token_id))


class ChunkWriter:
    """Writes the chunks of one stream, in either of the two shapes.

    Args:
        write: takes one whole SSE frame.
        member: what goes before and after a text inside a choice, e.g. `"delta":{"content":` and `}`.
        last_member: what stands there in the chunk that ends a choice.
        include_usage: every chunk has `usage`, null but in the last.
    """

    def __init__(
        self,
        write: Callable[[bytes], None],
        head: AnswerHead,
        member: tuple[bytes, bytes],
        last_member: bytes,
        include_usage: bool,
    ) -> None:
        self._write = write
        self._start = head.frame_start()
        self._before, self._after = member
        self._last_member = last_member
        self._include_usage = include_usage
        self._end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._plain_end = b',"logprobs":null,"finish_reason":null}' + self._end
        # All that stands before the text of a choice without logprobs, by its index; filled on first use.
        self._text_starts: dict[int, bytes] = {}
        self._text_end = self._after + self._plain_end
        self.has_failed = False

    def member(self, index: int, member: bytes) -> None:
        """A chunk that holds something else than text, such as the role."""
        self._write(b'%b{"index":%d,%b%b' % (self._start, index, member, self._plain_end))

    def text(self, index: int, text: str, logprobs: msgspec.Struct | None = None) -> None:
        """A chunk with text."""
        if logprobs is None:
            start = self._text_starts.get(index)
            if start is None:
                start = self._text_starts[index] = b'%b{"index":%d,%b' % (self._start, index, self._before)
            self._write(start + msgspec.json.encode(text) + self._text_end)
            return
        body = self._before + msgspec.json.encode(text) + self._after
        encoded = msgspec.json.encode(logprobs)
        tail = b',"logprobs":%b,"finish_reason":null}%b' % (encoded, self._end)
        self._write(b'%b{"index":%d,%b%b' % (self._start, index, body, tail))

    def end(self, index: int, reason: str, logprobs: msgspec.Struct | None = None) -> None:
        """The chunk that ends a choice."""
        tail = b',"logprobs":%b,"finish_reason":"%b"}%b' % (
            b"null" if logprobs is None else msgspec.json.encode(logprobs),
            reason.encode(),
            self._end,
        )
        self._write(b'%b{"index":%d,%b%b' % (self._start, index, self._last_member, tail))

    def usage(self, usage: Usage) -> None:
        """The chunk with the usage, if the client asked for it, and the end of the stream."""
        if self._include_usage:
            self._write(self._start + b'],"usage":' + msgspec.json.encode(usage) + b"}\n\n")
        self._write(b"data: [DONE]\n\n")

    def error(self, index: int, error: LightLLMError) -> None:
        """The chunk of a failure: the last one, once."""
        if not self.has_failed:
            self.has_failed = True
            choice = b'{"index":%d,%b,"finish_reason":"error"}],' % (index, self._last_member)
            self._write(self._start + choice + envelope_members(error) + b"}\n\n")
