"""What `lightllm doctor` says, line by line, and what its checks look at."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from lightllm.config import Config

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(msgspec.Struct, frozen=True):
    """One line: `status` is ok, warn or fail; `remedy` says what to do, empty if nothing."""

    name: str
    status: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.status:<5} {self.name:<14} {self.text}{remedy}"


class Case(NamedTuple):
    """What every check may look at; `spelled` is how flags were given, by name."""

    config: Config
    environ: Mapping[str, str]
    spelled: Mapping[str, str] = MappingProxyType({})


Check = Callable[[Case], Iterator[Finding]]
