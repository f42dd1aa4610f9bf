"""One client request while it is generated: its samples, and the way of each token to the client.

Each `SampleStream` is the sink of one engine request: it detokenizes, matches stop strings and calls the
client's `emit` for every token, synchronously. Handlers wait only for the first output and for the end. Runs
in the frontend's event loop; knows nothing of HTTP or JSON.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from lightllm.errors import LightLLMError
from lightllm.frontend.detokenizer import Detokenizer
from lightllm.frontend.engine_client import EngineClientLike, error_of
from lightllm.messages import EngineRequest, RequestFailure, RequestOutput, TokenLogprobs
from lightllm.packed_ints import Ints

FIRST_OUTPUT_LIMIT_S = 5.0
# The engine ends a request at its deadline; only if it does not, the frontend does, this much later.
DEADLINE_GRACE_S = 1.0

Emit = Callable[["SampleStream", int | None, str, TokenLogprobs | None], None]
"""Called for each token: the sample, the token's id, the text that became certain, its logprobs.

`sample.finish_reason` is set at the last call; its id is None where the end came without a token of its own.
"""


class Observer(Protocol):
    """Who keeps count."""

    generated_tokens: int

    def inter_token(self, gap_s: float) -> None:
        """The time between two outputs of a sample."""
        ...

    def first_token(self, generation: "Generation") -> None:
        """The first output of a generation has come."""
        ...

    def finished(self, generation: "Generation") -> None:
        """A generation has ended, in whatever way."""
        ...


class NoObserver:
    """Counts nothing."""

    generated_tokens = 0

    def inter_token(self, gap_s: float) -> None:
        return

    def first_token(self, generation: "Generation") -> None:
        return

    def finished(self, generation: "Generation") -> None:
        return


class SampleStream:
    """One sample of one prompt: the sink of one engine request.

    Attributes:
        index: position among the generation's samples (prompt index * n + sample).
        num_tokens: output tokens so far, the end token included.
        finish_reason: stop, length, abort or error once it has ended.
        text_offset: characters decoded before the token being emitted.
    """

    __slots__ = (
        "_client",
        "_detokenizer",
        "_emit",
        "_generation",
        "_last_s",
        "_observer",
        "_print_end",
        "finish_reason",
        "index",
        "num_cached_tokens",
        "num_tokens",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
        "text_offset",
    )

    def __init__(
        self,
        generation: "Generation",
        index: int,
        request: EngineRequest,
        detokenizer: Detokenizer,
        emit: Emit,
        print_end: Callable[[int], str],
    ) -> None:
        self.index = index
        self.request_id = request.request_id
        self.prompt_token_ids = request.prompt_token_ids
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.text_offset = 0
        self._generation = generation
        self._client = generation.client
        self._observer = generation.observer
        self._detokenizer = detokenizer
        self._emit = emit
        self._print_end = print_end
        self._last_s = 0.0

    def on_output(self, output: RequestOutput) -> None:
        """Take the output of a step and pass its tokens on."""
        if self.finish_reason is not None:
            return
        if output.error is not None:
            self._generation.fail(output.error)
            return
        now_s = time.monotonic()
        ids = output.new_token_ids
        if self._last_s:
            self._observer.inter_token(now_s - self._last_s)
        elif ids or output.finish_reason:
            self.prompt_logprobs = output.prompt_logprobs
            self.num_cached_tokens = output.num_cached_tokens
            self._generation.note_first_output(output.queue_s)
        self._last_s = now_s
        self._observer.generated_tokens += len(ids)
        self._take_tokens(ids, output.logprobs, output.finish_reason)

    def _take_tokens(
        self, ids: list[int], logprobs: list[TokenLogprobs] | None, finish_reason: str | None
    ) -> None:
        detokenizer = self._detokenizer
        last = len(ids) - 1
        for i, token_id in enumerate(ids):
            self.num_tokens += 1
            self.text_offset = detokenizer.num_chars
            if finish_reason is not None and i == last:
                text, reason = self._last_text(token_id, finish_reason)
                self._end(reason)
            else:
                text = detokenizer.push(token_id)
                if detokenizer.matched_stop is not None:
                    self._client.abort(self.request_id, "stop")
                    self._end("stop")
            self._emit(self, token_id, text, logprobs[i] if logprobs is not None else None)
            if self.finish_reason is not None:
                return
        if finish_reason is not None:
            self.end_without_token(finish_reason)

    def _last_text(self, token_id: int, reason: str) -> tuple[str, str]:
        """The text that the last token brings, and the reason that the client is told."""
        detokenizer = self._detokenizer
        if reason == "stop":
            return detokenizer.finish(self._print_end(token_id)), reason
        text = detokenizer.push(token_id)
        if detokenizer.matched_stop is None:
            text += detokenizer.finish()
        # What was held back may complete a stop string when it is flushed.
        return text, reason if detokenizer.matched_stop is None else "stop"

    def end_without_token(self, reason: str) -> None:
        """End this sample now, with the text so far unless it failed; does nothing if it has ended."""
        if self.finish_reason is None:
            self.text_offset = self._detokenizer.num_chars
            text = "" if reason == "error" else self._detokenizer.finish()
            self._end(reason)
            self._emit(self, None, text, None)

    def _end(self, reason: str) -> None:
        self.finish_reason = reason
        self._generation.note_ended()


class Generation:
    """One client request while it is generated.

    Attributes:
        request_id: `req_` + 32 hex digits; its samples are `request_id/i` when there are several.
        samples: prompt-major: all samples of the first prompt first.
        finished: done when every sample has ended; never raises, see `error`.
        error: why it failed, None if it did not.
        arrival_s, first_s, end_s: monotonic seconds, 0.0 for what has not happened.
        queue_s: how long the first sample waited for admission, known from `first_s` on.
    """

    def __init__(
        self, request_id: str, client: EngineClientLike, observer: Observer, prompts: list[Ints]
    ) -> None:
        self.request_id = request_id
        self.client = client
        self.observer = observer
        self.prompts = prompts
        self.samples: list[SampleStream] = []
        self.error: LightLLMError | None = None
        self.deadline_s: float | None = None
        self.arrival_s = time.monotonic()
        self.arrival_unix_s = time.time()
        self.first_s = 0.0
        self.end_s = 0.0
        self.queue_s = 0.0
        loop = asyncio.get_running_loop()
        self.finished: asyncio.Future[None] = loop.create_future()
        self._first: asyncio.Future[None] = loop.create_future()
        self._num_open = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache; of siblings sharing a prompt, the first one's."""
        per_prompt = max(1, len(self.samples) // max(1, len(self.prompts)))
        return sum(sample.num_cached_tokens for sample in self.samples[::per_prompt])

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of all samples."""
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def finish_reason(self) -> str | None:
        """error, or that of the first sample; None while any sample runs."""
        if self.error is not None:
            return "error"
        return self.samples[0].finish_reason if self.finished.done() and self.samples else None

    async def wait_first(self) -> None:
        """Wait until there is any output or the end, at most FIRST_OUTPUT_LIMIT_S after arrival.

        Raises:
            LightLLMError: it failed before any output.
        """
        left_s = self.arrival_s + FIRST_OUTPUT_LIMIT_S - time.monotonic()
        if left_s > 0:
            await asyncio.wait({self._first}, timeout=left_s)
        if self.error is not None:
            raise self.error

    def abort(self, reason: str = "abort") -> None:
        """End all samples that still run with the text so far; does nothing if all have ended."""
        for sample in self.samples:
            if sample.finish_reason is None:
                self.client.abort(sample.request_id, "abort")
                sample.end_without_token(reason)

    def fail(self, failure: RequestFailure) -> None:
        """End the whole generation in an error: one sample's failure is the request's."""
        if self.finished.done():
            return
        retry_after_s = self.client.retry_after_s() if failure.code == "queue_full" else None
        self.error = error_of(failure, retry_after_s)
        self.abort("error")

    def note_first_output(self, queue_s: float) -> None:
        """Called by a sample at its first output."""
        if not self._first.done():
            self._first.set_result(None)
            self.queue_s = queue_s
            self.first_s = time.monotonic()
            self.observer.first_token(self)

    def note_ended(self) -> None:
        """Called by each sample once, when it ends."""
        self._num_open -= 1
        if self._num_open:
            return
        self.end_s = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
        for future in (self._first, self.finished):
            if not future.done():
                future.set_result(None)
        self.observer.finished(self)

    def open(self, samples: list[SampleStream], deadline_s: float | None) -> None:
        """Set the samples and arm the deadline (Unix seconds) as a second line behind the engine's own."""
        self.samples = samples
        self._num_open = len(samples)
        self.deadline_s = deadline_s
        if deadline_s is not None:
            delay_s = deadline_s - time.time() + DEADLINE_GRACE_S
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        self.fail(
            RequestFailure(code="deadline", message="the deadline passed before the answer was complete")
        )
