"""Drafts from a request's own tokens: what followed the last time that its latest few tokens stood there.

A step computes the drafted positions together with the one that is due, and samples behind each of them; the
samples that agree with their drafts, and one more, are the request's next tokens. Which tokens come out does
not change, only how many a step brings (prompt lookup decoding: A. Saxena, 2023; acceptance by equality is
exact here, since the noise of a sample depends on its position alone).

Knows requests, but neither slots nor batches nor a clock; durations are told. Runs in the engine process.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from lightllm.messages import StepOutput

if TYPE_CHECKING:
    from lightllm.scheduler.request import Request

# Lengths of the tails that are looked for, longest first. Shorter ones recur by chance.
TAILS = (4, 3, 2)
FIRST_DRAFTS = 2
# A request that has lost so many plain steps by drafting pauses, for a number of tokens that doubles.
MAX_LOSS_STEPS = 2.0
FIRST_PAUSE, MAX_PAUSE = 32, 512
# Share of a new duration in the mean of plain steps.
SMOOTHING = 0.2


class Drafter:
    """Drafting for a single stream: while other requests are alive, it costs them more than it brings.

    Args:
        max_drafts: as `--draft_ngram`.
    """

    def __init__(self, max_drafts: int) -> None:
        self._max_drafts = max_drafts
        # Mean duration of a step of one token; 0.0 until there was one.
        self._plain_s = 0.0

    def choose(self, decodes: list[Request], *, is_alone: bool, room: int) -> tuple[list[Request], list[int]]:
        """Decide which of the decodes are scheduled now.

        A request whose next token is in flight is kept back if there may be a draft behind that token, and
        always while drafts are in flight, since nobody knows how many of them will stay.

        Args:
            is_alone: there is no other live request.
            room: how many tokens may be drafted.

        Returns:
            The decodes to schedule, and the drafts of the one that there is; usually none.
        """
        ready = [r for r in decodes if r.drafting is None or not r.drafting.num_in_flight]
        if len(ready) != 1 or not is_alone or not self._plain_s:
            return ready, []
        (request,) = ready
        if request.drafting is None:
            request.drafting = Drafting(self._max_drafts)
        # The last of the sampled tokens is the last that the request may have; its KV is not needed.
        room = min(room, request.max_num_tokens - request.num_computed_tokens - 2)
        drafts = request.drafting.propose(request.token_ids, room)
        if not drafts:
            return ready, []
        if request.num_in_flight:
            return [], []
        request.drafting.num_in_flight = len(drafts)
        return ready, drafts

    def note(self, output: StepOutput, num_tokens: int) -> None:
        """A step of so many tokens is back."""
        if num_tokens == 1 and output.duration_s > 0:
            share = SMOOTHING if self._plain_s else 1.0
            self._plain_s += (output.duration_s - self._plain_s) * share

    def settle(self, request: Request, token_ids: list[int], duration_s: float) -> list[int]:
        """Give a request the tokens of its step with drafts, as far as it wants them.

        Returns:
            Those it has taken; behind them `num_computed_tokens` and the slots may reach too far.
        """
        drafting = request.drafting
        assert drafting is not None, f"{request.request_id} has no drafts in flight"
        request.num_in_flight -= 1 + drafting.num_in_flight
        taken = []
        for token_id in token_ids:
            request.token_ids.append(token_id)
            taken.append(token_id)
            if request.finish_reason() is not None:
                break
        drafting.settle(len(token_ids) - 1, len(request.token_ids), duration_s, self._plain_s)
        return taken


class Drafting:
    """How one request drafts: how many tokens at a time, and whether that pays.

    Args:
        max_drafts: as `--draft_ngram`.

    Attributes:
        num_in_flight: drafts in the one step that has any, until its result is here.
    """

    __slots__ = ("_balance", "_limit", "_max_drafts", "_pause", "_resume_at", "num_in_flight")

    def __init__(self, max_drafts: int) -> None:
        self.num_in_flight = 0
        self._max_drafts = max_drafts
        self._limit = min(FIRST_DRAFTS, max_drafts)
        self._balance = 0.0
        self._pause = FIRST_PAUSE
        self._resume_at = 0

    def propose(self, token_ids: array[int], room: int) -> list[int]:
        """Guess what follows all known tokens, at most `room` tokens; empty while it does not pay."""
        count = min(self._limit, room)
        if count <= 0 or len(token_ids) < self._resume_at:
            return []
        return continuation(token_ids, count)

    def settle(self, num_accepted: int, num_tokens: int, duration_s: float, plain_s: float) -> None:
        """The step with drafts is back.

        Args:
            num_accepted: drafts that the model agreed with.
            num_tokens: that the request has now.
            duration_s: of the step; plain_s: of one without drafts.
        """
        is_whole = num_accepted == self.num_in_flight
        self._limit = min(2 * self._limit, self._max_drafts) if is_whole else max(1, num_accepted)
        self.num_in_flight = 0
        gain = (1 + num_accepted) - duration_s / plain_s
        # What was won long ago is no reason to lose for long now.
        self._balance = min(self._balance + gain, MAX_LOSS_STEPS)
        if self._balance < -MAX_LOSS_STEPS:
            self._resume_at = num_tokens + self._pause
            self._pause = min(2 * self._pause, MAX_PAUSE)
            self._balance, self._limit = 0.0, 1
        elif self._balance == MAX_LOSS_STEPS:
            self._pause = FIRST_PAUSE


def continuation(token_ids: array[int], count: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest tail that has one: `count` tokens, or none.

    Where it runs into the end, it goes on with what it has found itself: a period goes on for ever.
    """
    data, size = token_ids.tobytes(), token_ids.itemsize
    for length in (length for length in TAILS if length < len(token_ids)):
        tail = data[-length * size :]
        end = len(data) - size  # an occurrence earlier than the tail itself
        at = data.rfind(tail, 0, end)
        while at > 0 and at % size:  # it begins inside a token
            at = data.rfind(tail, 0, at + len(tail) - 1)
        if at >= 0:
            period = len(token_ids) - at // size - length
            found = token_ids[-period:]
            return [found[i % period] for i in range(count)]
    return []
