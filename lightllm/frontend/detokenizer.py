"""From token ids to text, one sample at a time: what may be shown now, and where a stop string ends it.

Text is held back while it is an unfinished UTF-8 character or a possible start of a stop string; everything
else is shown at once. Runs in the frontend process. Knows nothing of requests, HTTP or the engine.
"""

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

from lightllm.frontend.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# A run of ids that never becomes valid text (broken output of a broken model) is shown after this many.
MAX_HELD_IDS = 64
SEED_IDS = 5


class Decoder(Protocol):
    """Turns ids into text piece by piece; the pieces joined are the decode of the whole."""

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is certain now."""
        ...

    def flush(self) -> str:
        """Return what is still held back, as it is; the decoder may go on afterwards."""
        ...


class _TokenBytes(dict[int, bytes]):
    """Bytes of each id, filled on first use; ids of `hidden` have none."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        data = b"" if token_id in self._hidden else self._tokenizer.token_bytes(token_id)
        self[token_id] = data
        return data


class TokenTexts(dict[int, str | None]):
    """Text of each id whose bytes are whole UTF-8 characters, None for the others; filled on first use."""

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        super().__init__()
        self.bytes = token_bytes

    def __missing__(self, token_id: int) -> str | None:
        try:
            text: str | None = self.bytes[token_id].decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


class ByteDecoder:
    """For byte-level vocabularies: the text of a sequence is the UTF-8 of its tokens' bytes joined."""

    __slots__ = ("_bytes", "_is_inside_character", "_texts", "_utf8")

    def __init__(self, token_texts: TokenTexts) -> None:
        self._texts = token_texts
        self._bytes = token_texts.bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_inside_character = False

    def push(self, token_id: int) -> str:
        text = self._texts[token_id]
        if text is not None and not self._is_inside_character:
            return text
        text = self._utf8.decode(self._bytes[token_id])
        self._is_inside_character = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        self._is_inside_character = False
        return self._utf8.decode(b"", True)


class WindowDecoder:
    """For all other vocabularies: decode a short window with and without the new id, show the difference.

    Such decoders treat the first token of a text specially (its space is stripped), so the window starts with
    the last ids of the prompt, unless these end inside a character. `tokenizers.DecodeStream` is not used: it
    fails on sequences whose prefix decodes to nothing, and it cannot be flushed.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_tail: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt_tail)
        self._num_shown = len(self._window)
        self._prefix = self._decode(self._window)
        if self._prefix.endswith(REPLACEMENT):
            self._window, self._num_shown, self._prefix = [], 0, ""

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._num_shown < MAX_HELD_IDS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        new = text[len(self._prefix) :]
        if new:
            # The ids just shown become the context of the next ones; older ones are no longer needed.
            self._window = self._window[self._num_shown :]
            self._num_shown = len(self._window)
            self._prefix = self._decode(self._window)
        return new


class SpacedDecoder:
    """Puts a space between special tokens and the text around them, as LightLLM's native API does."""

    def __init__(self, inner: Decoder, special_text: dict[int, str]) -> None:
        self._inner = inner
        self._special_text = special_text
        self._has_text = False
        self._is_after_special = False

    def push(self, token_id: int) -> str:
        special = self._special_text.get(token_id)
        if special is None:
            return self._spaced(self._inner.push(token_id))
        text = self._spaced(self._inner.flush())
        text += " " + special if self._has_text else special
        self._has_text = self._is_after_special = True
        return text

    def flush(self) -> str:
        return self._spaced(self._inner.flush())

    def _spaced(self, text: str) -> str:
        if text:
            text = " " + text if self._is_after_special else text
            self._has_text, self._is_after_special = True, False
        return text


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces, wherever the borders of the pieces fall.

    The match that is complete first wins; of several that end at the same character, the one that starts
    first. Knuth-Morris-Pratt per stop string: linear in the text, whatever the strings are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._fails = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._first_chars = frozenset(stop[0] for stop in self._stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take a piece of text.

        Returns:
            The text before the match or certain not to be part of one, and the stop string if one is
            complete.
        """
        if not self._held and self._first_chars.isdisjoint(text):
            return text, None
        for end, char in enumerate(text, 1):
            hit = self._advance(char)
            if hit:
                buffer = self._held + text[:end]
                self._held = ""
                return buffer[: len(buffer) - len(hit)], hit
        buffer = self._held + text
        border = len(buffer) - max(self._states)
        self._held = buffer[border:]
        return buffer[:border], None

    def flush(self) -> str:
        """The text held back, once nothing more can come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str:
        hit = ""
        states = self._states
        for index, stop in enumerate(self._stops):
            state = states[index]
            while state and stop[state] != char:
                state = self._fails[index][state - 1]
            if stop[state] == char:
                state += 1
            states[index] = state
            if state == len(stop) and state > len(hit):
                hit = stop
        return hit


def _failure_table(stop: str) -> list[int]:
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table


class Detokenizer:
    """The text of one sample: `push` ids, `finish` once; `matched_stop` ends it early.

    Attributes:
        matched_stop: the stop string found, after which nothing more may be pushed.
        num_chars: characters decoded so far, held back ones of stop strings included.
    """

    __slots__ = ("_decoder", "_include_stop", "_matcher", "matched_stop", "num_chars")

    def __init__(self, decoder: Decoder, stops: Sequence[str] = (), include_stop: bool = False) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stops) if stops else None
        self._include_stop = include_stop
        self.matched_stop: str | None = None
        self.num_chars = 0

    def push(self, token_id: int) -> str:
        """Take one id and return the text that may be shown now."""
        text = self._decoder.push(token_id)
        if self._matcher is not None:
            return self._shown(text)
        self.num_chars += len(text)
        return text

    def finish(self, end_text: str = "") -> str:
        """Return all text still held back, followed by `end_text` (a printed end token)."""
        text = self._shown(self._decoder.flush())
        if self.matched_stop is not None:
            return text
        if self._matcher is not None:
            text += self._matcher.flush()
        self.num_chars += len(end_text)
        return text + end_text

    def _shown(self, text: str) -> str:
        if not text:
            return ""
        self.num_chars += len(text)
        if self._matcher is None:
            return text
        shown, self.matched_stop = self._matcher.push(text)
        if self.matched_stop is not None and self._include_stop:
            shown += self.matched_stop
        return shown


class DetokenizerFactory:
    """Makes detokenizers for one tokenizer; holds the tables that they share."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in repr(tokenizer.backend.decoder)
        self._all_bytes = _TokenBytes(tokenizer, frozenset())
        self._all_texts = TokenTexts(self._all_bytes)
        self._plain_texts = TokenTexts(_TokenBytes(tokenizer, tokenizer.special_ids))
        self._special_text = {
            token_id: self.token_text(token_id) for token_id in sorted(tokenizer.special_ids)
        }

    def new(
        self,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        add_spaces: bool = False,
        prompt_token_ids: Sequence[int] = (),
    ) -> Detokenizer:
        """A detokenizer for one sample.

        Args:
            stops: strings that end the text.
            include_stop: keep the matched one in the text.
            skip_special_tokens: special tokens have no text.
            add_spaces: put spaces around special tokens that are shown.
            prompt_token_ids: what the output follows.
        """
        decoder: Decoder
        if self._is_byte_level:
            decoder = ByteDecoder(self._plain_texts if skip_special_tokens else self._all_texts)
        else:
            decoder = WindowDecoder(self.tokenizer, skip_special_tokens, prompt_token_ids[-SEED_IDS:])
        if add_spaces and not skip_special_tokens:
            decoder = SpacedDecoder(decoder, self._special_text)
        return Detokenizer(decoder, stops, include_stop)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for, special or not."""
        return self._all_bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """One token as text; bytes that are no UTF-8 by themselves as `bytes:\\xe4\\xbd`."""
        data = self._all_bytes[token_id]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
