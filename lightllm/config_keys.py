"""Keys: typed access to the configuration of a foreign model, be it JSON or GGUF metadata.

L0: plain values only. Knows no key by name; model_config.py and weights/gguf_config.py do.
"""

import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from lightllm.errors import ModelLoadError


class Keys:
    """Typed access to a foreign dictionary; every complaint names the key and where it stands.

    JSON null counts as absent. A key without a default is required.

    Args:
        values: the dictionary.
        origin: where it stands, for messages.
        prefix: put before every key that is asked for.
    """

    def __init__(self, values: Mapping[str, Any], origin: str, prefix: str = "") -> None:
        self.values = values
        self.origin = origin
        self.prefix = prefix

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Complain about the value of a key.

        Raises:
            ModelLoadError: always.
        """
        got = self.values.get(self.prefix + key)
        raise ModelLoadError(f"{self.origin}: {self.prefix}{key}: got {got!r:.80}, expected {expected}")

    def _get(self, key: str, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.values.get(self.prefix + key)
        if value is None:
            return None
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            self.refuse(key, expected)
        return value

    def _choose(self, key: str, value: Any, default: Any, expected: str) -> Any:
        chosen = default if value is None else value
        if chosen is None:
            raise ModelLoadError(f"{self.origin}: key {self.prefix + key!r} is missing; expected {expected}")
        return chosen

    def optional_int(self, key: str) -> int | None:
        """An integer >= 0, or None."""
        value = self._get(key, (int,), "an integer >= 0")
        if value is not None and value < 0:
            self.refuse(key, "an integer >= 0")
        return None if value is None else int(value)

    def positive(self, key: str, default: int | None = None, most: int = (1 << 31) - 1) -> int:
        """An integer from 1 to `most`: a damaged size must not become a loop or an allocation."""
        expected = f"an integer from 1 to {most}"
        value = int(self._choose(key, self.optional_int(key), default, expected))
        if not 1 <= value <= most:
            self.refuse(key, expected)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._choose(key, self._get(key, (int, float), "a number"), default, "a number")
        if not 0.0 < value <= sys.float_info.max:
            self.refuse(key, "a finite number above 0")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number above zero, or None."""
        return None if self._get(key, (int, float), "a number") is None else self.number(key)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        return bool(self._choose(key, self._get(key, (bool,), "true or false"), default, "true or false"))

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return str(self._choose(key, self._get(key, (str,), "a string"), default, "a string"))

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; empty if absent."""
        return dict(self._get(key, (dict,), "an object") or {})

    def sequence(self, key: str) -> list[Any]:
        """A list; empty if absent."""
        return self._get(key, (list,), "a list") or []

    def ids(self, key: str) -> list[int]:
        """Token ids, written as one integer or as a list of them; empty if absent."""
        value = self._get(key, (int, list), "a token id or a list of them")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            self.refuse(key, "token ids >= 0")
        return ids
