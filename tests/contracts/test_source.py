"""The rules on the source text, and proof that each of them can fail."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contracts import source_rules as rules

ROOT = Path(__file__).parents[2]
DOC = '"""What this module owns."""\n'

# path:NAME of module-level state that may stay, each with its reason here.
ALLOWED_STATE: frozenset[str] = frozenset()

Rule = Callable[[Path], list[str]]


def check_package_state(root: Path) -> list[str]:
    return rules.check_module_state(root, ALLOWED_STATE)


EVERYWHERE = (rules.check_file_size, rules.check_names, rules.check_statements, rules.check_text)
PACKAGE_ONLY = (
    rules.check_ascii,
    rules.check_function_size,
    rules.check_imports,
    rules.check_calls,
    rules.check_all_sorted,
    check_package_state,
)

BAD = (
    (rules.check_file_size, "a.py", DOC + "x = 1\n" * 500, "501 lines, limit 500"),
    (rules.check_function_size, "a.py", "def f():\n" + "    x = 1\n" * 60, "a.py:1 f: 61 lines"),
    (
        rules.check_function_size,
        "a.py",
        "class A:\n    async def f():\n" + "        x = 1\n" * 60,
        "61 lines",
    ),
    (rules.check_names, "utils/a.py", "", "utils"),
    (rules.check_names, "api/common.py", "", "common"),
    (rules.check_imports, "a.py", "def f():\n    import pickle", "imports pickle"),
    (rules.check_imports, "a.py", "from multiprocessing import Pool", "imports multiprocessing.Pool"),
    (rules.check_imports, "a.py", "import rpyc.core", "imports rpyc.core"),
    (rules.check_calls, "a.py", "eval('1')", "uses eval"),
    (rules.check_calls, "a.py", "run = exec", "uses exec"),
    (rules.check_calls, "a.py", "torch.load(path, weights_only=True)", "uses torch.load"),
    (rules.check_calls, "a.py", "from torch import load", "uses torch.load"),
    (rules.check_calls, "a.py", "socket.send_pyobj(1)", "uses socket.send_pyobj"),
    (rules.check_statements, "a.py", "def f():\n    global x\n    x = 1", "global x"),
    (rules.check_statements, "a.py", "try:\n    f()\nexcept:\n    pass", "bare except"),
    (rules.check_ascii, "a.py", DOC + "x = '\u00b5s'", "a.py:2 is not ASCII"),
    (rules.check_text, "a.py", DOC + "x = 1  # TO" + "DO later", "has a TO" + "DO"),
    (rules.check_text, "a.py", "x = 1", "no module docstring"),
    (rules.check_all_sorted, "a.py", "__all__ = ['b', 'a']", "not sorted"),
    (rules.check_all_sorted, "a.py", "__all__ = ('a', 'a')", "repeats"),
    (rules.check_module_state, "a.py", "cache = {}", "cache is mutable"),
    (rules.check_module_state, "a.py", "seen: set[int] = set()", "seen is mutable"),
    (rules.check_module_state, "a.py", "if True:\n    rows = [1] * 8", "rows is mutable"),
    (rules.check_module_state, "a.py", "import collections\nq = collections.deque()", "q is mutable"),
    (rules.check_module_state, "a.py", "a = [x for x in range(3)]", "a is mutable"),
)

GOOD = {
    "__init__.py": "",
    "api/rows.py": DOC
    + """
from multiprocessing.shared_memory import SharedMemory
from types import MappingProxyType

__all__ = ["ROWS", "f"]
ROWS = MappingProxyType({"a": (1, 2)})
NAMES = frozenset({"a"})
ORDER = tuple([1, 2])


def f(pattern):
    rows = []
    try:
        rows.append(re.compile(pattern))
    except ValueError:
        pass
    return rows
""",
    "kernels/long.py": DOC + "def f():\n" + "    x = 1\n" * 100,
}


def write_package(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return root


@pytest.mark.parametrize("rule", EVERYWHERE)
# The package last: its own rules come next, and find it parsed.
@pytest.mark.parametrize("folder", ["benchmarks", "test", "tests", "lightllm"])
def test_all_code_obeys(rule: Rule, folder: str) -> None:
    assert rule(ROOT / folder) == []


@pytest.mark.parametrize("rule", PACKAGE_ONLY)
def test_package_obeys(rule: Rule) -> None:
    assert rule(ROOT / "lightllm") == []


def test_rules_see_the_package() -> None:
    assert "errors.py" in {name for name, _, _ in rules.sources(ROOT / "lightllm")}


@pytest.mark.parametrize("rule", [*EVERYWHERE, *PACKAGE_ONLY])
def test_rule_accepts_good_code(rule: Rule, tmp_path: Path) -> None:
    assert rule(write_package(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("rule", "name", "text", "complaint"), BAD)
def test_rule_finds_bad_code(rule: Rule, name: str, text: str, complaint: str, tmp_path: Path) -> None:
    problems = rule(write_package(tmp_path, GOOD | {name: text}))
    assert len(problems) == 1
    assert complaint in problems[0]


def test_state_can_be_allowed(tmp_path: Path) -> None:
    root = write_package(tmp_path, {"a.py": "cache = {}"})
    assert rules.check_module_state(root, frozenset({"a.py:cache"})) == []
