"""Rules on the source text itself: sizes, names, forbidden calls, module-level state.

Knows the source text only (ast); never imports what it checks. Every rule takes a folder and returns one line
per violation, so that tests can run it on a folder with a deliberate mistake.
"""

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

FORBIDDEN_NAMES = frozenset({"common", "helpers", "misc", "util", "utils"})
# Each of these turns bytes into running code, or pickles behind the scenes.
FORBIDDEN_IMPORTS = frozenset(
    {
        "cPickle",
        "cloudpickle",
        "dill",
        "joblib",
        "jsonpickle",
        "marshal",
        "multiprocessing",
        "pickle",
        "rpyc",
        "shelve",
    }
)
ALLOWED_IMPORTS = frozenset({"multiprocessing.shared_memory"})
FORBIDDEN_CALLS = frozenset({"__import__", "eval", "exec"})
FORBIDDEN_ATTRIBUTES = frozenset(
    {
        "torch.load",
        "all_gather_object",
        "broadcast_object_list",
        "gather_object",
        "recv_object_list",
        "recv_pyobj",
        "scatter_object_list",
        "send_object_list",
        "send_pyobj",
    }
)
# fmt: off
MUTABLE_CALLS = frozenset({
    "ChainMap", "ContextVar", "Counter", "Event", "Lock", "OrderedDict", "Queue", "RLock", "Random",
    "SimpleQueue", "WeakKeyDictionary", "WeakSet", "WeakValueDictionary", "bytearray", "count", "cycle",
    "defaultdict", "deque", "dict", "list", "local", "set",
})
# fmt: on
NOTES = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")


@lru_cache(maxsize=1)
def sources(root: Path) -> tuple[tuple[str, ast.Module, str], ...]:
    """Every Python file below `root`: its relative path, its tree, its text.

    The last folder is remembered, since all rules look at it, and most of their time is parsing.
    """
    texts = ((path, path.read_text("utf-8")) for path in sorted(root.rglob("*.py")))
    return tuple((path.relative_to(root).as_posix(), ast.parse(text), text) for path, text in texts)


def check_file_size(root: Path) -> list[str]:
    """No file is longer than MAX_FILE_LINES."""
    return [
        f"{name}: {lines} lines, limit {MAX_FILE_LINES}"
        for name, _, text in sources(root)
        if (lines := text.count("\n")) > MAX_FILE_LINES
    ]


def check_function_size(root: Path) -> list[str]:
    """No function outside kernels/ is longer than MAX_FUNCTION_LINES, docstring included."""
    problems = []
    for name, tree, _ in sources(root):
        if name.startswith("kernels/"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    problems.append(
                        f"{name}:{node.lineno} {node.name}: {lines} lines, limit {MAX_FUNCTION_LINES}"
                    )
    return problems


def check_names(root: Path) -> list[str]:
    """No folder or module has a name that says nothing."""
    paths = [
        path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_dir() or path.suffix == ".py"
    ]
    return [
        f"{path.as_posix()}: name a thing, not a drawer" for path in paths if path.stem in FORBIDDEN_NAMES
    ]


def check_imports(root: Path) -> list[str]:
    """Nothing that unpickles or runs foreign code is imported, not even late."""
    problems = []
    for name, tree, _ in sources(root):
        for node in ast.walk(tree):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in found:
                is_allowed = any((module + ".").startswith(prefix + ".") for prefix in ALLOWED_IMPORTS)
                if module.split(".")[0] in FORBIDDEN_IMPORTS and not is_allowed:
                    problems.append(f"{name}:{node.lineno} imports {module}")
    return problems


def check_calls(root: Path) -> list[str]:
    """No eval, exec, torch.load, nor a method that pickles its argument."""
    problems = []
    for name, tree, _ in sources(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in FORBIDDEN_CALLS:
                problems.append(f"{name}:{node.lineno} uses {node.id}")
            elif isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                if {node.attr, f"{owner}.{node.attr}"} & FORBIDDEN_ATTRIBUTES:
                    problems.append(f"{name}:{node.lineno} uses {owner}.{node.attr}")
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                problems += [
                    f"{name}:{node.lineno} uses {found}" for found in sorted(names & FORBIDDEN_ATTRIBUTES)
                ]
    return problems


def check_statements(root: Path) -> list[str]:
    """No `global`, no bare `except`."""
    problems = []
    for name, tree, _ in sources(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                problems.append(f"{name}:{node.lineno} global {', '.join(node.names)}")
            elif isinstance(node, ast.ExceptHandler) and node.type is None:
                problems.append(f"{name}:{node.lineno} bare except")
    return problems


def check_text(root: Path) -> list[str]:
    """No notes to self, and a docstring in every module that has code."""
    problems = []
    for name, tree, text in sources(root):
        for number, line in enumerate(text.splitlines(), 1):
            if note := NOTES.search(line):
                problems.append(f"{name}:{number} has a {note.group()}")
        if tree.body and ast.get_docstring(tree) is None:
            problems.append(f"{name}: no module docstring")
    return problems


def check_ascii(root: Path) -> list[str]:
    """ASCII only: other characters are written as escapes, so that everybody can read and type them."""
    return [
        f"{name}:{number} is not ASCII"
        for name, _, text in sources(root)
        for number, line in enumerate(text.splitlines(), 1)
        if not line.isascii()
    ]


def check_all_sorted(root: Path) -> list[str]:
    """`__all__` is a literal, sorted and without repeats."""
    problems = []
    for name, tree, _ in sources(root):
        for target, value in _module_assignments(tree):
            if target == "__all__":
                names = ast.literal_eval(value)
                if list(names) != sorted(set(names)):
                    problems.append(f"{name}:{value.lineno} __all__ is not sorted, or repeats a name")
    return problems


def check_module_state(root: Path, allowed: frozenset[str] = frozenset()) -> list[str]:
    """No module-level name is bound to something mutable.

    Args:
        allowed: exceptions, as `path.py:NAME`.
    """
    problems = []
    for name, tree, _ in sources(root):
        for target, value in _module_assignments(tree):
            if target != "__all__" and f"{name}:{target}" not in allowed and _is_mutable(value):
                problems.append(
                    f"{name}:{value.lineno} {target} is mutable; use a tuple, frozenset or MappingProxyType"
                )
    return problems


def _module_assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Name and value of every assignment that runs at import time, outside classes."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield ast.unparse(target), node.value
        pending.extend(
            child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)
        )


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    if isinstance(value, ast.BinOp | ast.IfExp | ast.BoolOp):
        return any(_is_mutable(child) for child in ast.iter_child_nodes(value) if isinstance(child, ast.expr))
    if isinstance(value, ast.Call):
        called = value.func.attr if isinstance(value.func, ast.Attribute) else ast.unparse(value.func)
        return called in MUTABLE_CALLS
    return False
