"""Reads the commands out of the documentation: fenced shell blocks and `make` targets named in the text.

Knows Markdown fences, prompts (`$ `), line continuations, leading VAR=value and comments; runs nothing.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SHELL_LANGUAGES = ("bash", "console", "sh", "shell")
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE
)
ASSIGNMENT = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*=")
INLINE_MAKE = re.compile(r"`make ([a-z-]+)")
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


class Command(NamedTuple):
    """One command line of a document, split as a shell would."""

    place: str
    environment: dict[str, str]
    words: tuple[str, ...]


class Block(NamedTuple):
    """One fenced block."""

    place: str
    language: str
    text: str


def documents(root: Path) -> list[Path]:
    """The documents that users read."""
    return sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md"), *(root / "benchmarks").rglob("*.md")])


def blocks(path: Path) -> Iterator[Block]:
    """Every fenced block of a document."""
    text = path.read_text("utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        yield Block(f"{path.name}:{line}", match["language"], match["body"])


def commands(path: Path) -> Iterator[Command]:
    """Every command of a document's shell blocks; `a && b` and `a | b` are two."""
    for block in blocks(path):
        if block.language in SHELL_LANGUAGES:
            for words in _split(block.text):
                count = next((i for i, word in enumerate(words) if not ASSIGNMENT.match(word)), len(words))
                pairs = (word.split("=", 1) for word in words[:count])
                yield Command(block.place, dict(pairs), tuple(words[count:]))


def _split(text: str) -> Iterator[list[str]]:
    text = re.sub(r"^\s*\$ ", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    text = re.sub(r"(^|\s)#[^'\"\n]*$", r"\1", text, flags=re.MULTILINE)
    # The line break is punctuation to the lexer, so that one inside quotes (a JSON body) ends no command.
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set(";&|\n"):
            words.append(word)
        elif words:
            yield words
            words = []


def inline_make_targets(path: Path) -> set[str]:
    """Targets of every `make TARGET` in a document's text."""
    return set(INLINE_MAKE.findall(path.read_text("utf-8")))


def relative_links(path: Path) -> set[str]:
    """Targets of links that stay inside the repository, without their anchors."""
    targets = {match["target"].split("#")[0] for match in LINK.finditer(path.read_text("utf-8"))}
    return {target for target in targets if target and "://" not in target}


def make_targets(makefile: Path) -> set[str]:
    """Targets that the Makefile offers to people."""
    return set(re.findall(r"^([a-z-]+):.*## ", makefile.read_text("utf-8"), re.MULTILINE))
