"""What a flag is: the metadata of a configuration field, a row of the flag table, and what a user gave.

L0: plain types. The flags themselves are the fields of the sections in `config.py`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

MAX_INT = 2**31 - 1
# Stages of development in this version; see Flag.
BUILT_STAGES = frozenset({"S", "G", "T", "P"})


@dataclass(frozen=True, slots=True)
class Flag:
    """What is known of one flag beside its name, type and default.

    Attributes:
        help: one sentence for `--help`.
        stage: the stage of development that builds it (S serve, G GPU, T tensor parallel, P PD, D
            DeepSeek/MoE, A full API, "-" later). A flag of an unbuilt stage is refused unless it has its
            default value.
        choices: allowed words; `choice_stages` names the stage of those that come later than the flag itself.
        synonyms: other spellings of a choice.
        low, high: bounds, included unless `is_open`.
        kind: a further check of a text: host, url, origin, store, path.
        aliases: other names of the flag.
        unset: how a default of None, () or "0 until resolved" is shown; a flag of one value takes it as text
            too.
        is_repeatable: may be given several times; `is_list`: takes several values at once.
        is_secret: `@file` is read, and the value never appears in a log or a process title.
        metavar: the placeholder in `--help` where the type's own says too little.
    """

    help: str
    stage: str = "S"
    choices: tuple[str, ...] = ()
    choice_stages: tuple[tuple[str, str], ...] = ()
    synonyms: tuple[tuple[str, str], ...] = ()
    low: float = 0
    high: float = MAX_INT
    is_open: bool = False
    kind: str = ""
    aliases: tuple[str, ...] = ()
    unset: str = "none"
    is_repeatable: bool = False
    is_list: bool = False
    is_secret: bool = False
    metavar: str = ""


class FlagSpec(NamedTuple):
    """One row of the flag table.

    `value_type` is the type of one value (int, float, bool, str or dict), without Optional or tuple.
    """

    name: str
    section: str
    title: str
    value_type: type
    default: Any
    flag: Flag

    @property
    def is_many(self) -> bool:
        """Whether the value is a tuple."""
        return self.flag.is_repeatable or self.flag.is_list

    @property
    def default_text(self) -> str:
        """The default as `--help` shows it."""
        if isinstance(self.default, bool):
            return "off"
        if self.default in (None, ()) or (self.default == 0 and self.flag.low > 0):
            return self.flag.unset
        if self.value_type is dict:
            return "{}"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


class Arguments(msgspec.Struct, frozen=True, kw_only=True):
    """What the user gave, on the command line or in the environment: typed, in range, not yet resolved.

    `values` and `spelled` are keyed by flag name; `spelled` is how the user wrote it (`--data_type`,
    `LIGHTLLM_PORT`).
    """

    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    warnings: list[str] = []
