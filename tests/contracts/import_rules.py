"""Who may import whom: the table, and the walk that holds the package to it.

Knows the source text only (ast); never imports what it checks. Every rule takes the package folder and
returns one line per violation, so that tests can run it on a folder with a deliberate mistake.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

PACKAGE = "lightllm"

L0 = (
    *("addresses", "cluster_link", "cluster_messages", "config", "config_keys", "env", "errors", "flag"),
    *("logs", "messages", "model_config", "node_link", "packed_ints", "rank_messages", "resolution"),
    *("sampling_params", "web_socket"),
)
TOP = ("__init__", "__main__", "cli", "llm", "server")

# unit (first name below the package) -> what it may import besides L0 and itself; longest prefix counts.
ALLOWED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bench": (),
        "api": ("frontend",),
        "frontend": (),
        "config_server": (),
        "scheduler": (),
        "engine": ("scheduler",),
        "worker": (
            "attention",
            "device",
            "distributed",
            "kernels",
            "layers",
            "models",
            "native",
            "transfer",
            "weights",
        ),
        "models": (
            "attention.base",
            "device.forward_batch",
            "distributed",
            "kernels",
            "layers",
            "weights.base",
        ),
        "layers": (
            "attention.base",
            "device.forward_batch",
            "distributed",
            "kernels",
            "native",
            "weights.base",
            "weights.codes",
        ),
        "attention": ("device", "kernels", "native"),
        "weights": (),
        "transfer": ("device", "distributed", "kernels"),
        "distributed": ("device", "native"),
        "device": (),
        "kernels": (),
        "native": (),
    }
)

# Imports allowed only in functions and for type checkers: importing module -> what it may load late, and why.
LAZY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "engine.executor": (
            "worker",
        ),  # the in-process executor starts its worker; the engine stays torch-free
        "models.document": ("weights.gguf_config",),  # the page names the kinds of GGUF files
        "worker.__main__": ("server.worker_main",),  # a name to start it by; assembling is the server's
    }
)

TORCH_FREE = (
    "api",
    "bench",
    "cli",
    "config_server",
    "engine",
    "frontend",
    "scheduler",
    "weights.gguf",
    "weights.gguf_config",
    *L0,
)
CUDA_MODULES = ("device", "distributed", "kernels", "transfer", "worker.cuda_graph")


class Import(NamedTuple):
    """One imported module, as seen from `module` (dotted, without the package's name)."""

    module: str
    target: str
    line: int
    is_lazy: bool


def modules(root: Path) -> Mapping[str, Path]:
    """Every module below the package folder `root`, by dotted name without the package's name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


@lru_cache(maxsize=1)
def imports(root: Path) -> tuple[Import, ...]:
    """All imports of the package, own modules without the package's name, foreign ones as `:name`.

    Those of the last package are remembered, since all rules look at them.
    """
    return tuple(_imports(root))


def _imports(root: Path) -> Iterator[Import]:
    known = modules(root)
    for module, path in known.items():
        tree = ast.parse(path.read_text("utf-8"))
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        if module == "__init__":
            package = []
        for node, is_lazy in _import_nodes(tree):
            for target in _targets(node, package, known):
                yield Import(module, target, node.lineno, is_lazy)


def _import_nodes(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    pending: list[tuple[ast.AST, bool]] = [(tree, False)]
    while pending:
        node, is_lazy = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, is_lazy
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_lazy = is_lazy or is_function or is_typing
        pending.extend((child, is_lazy) for child in ast.iter_child_nodes(node))


def _targets(node: ast.Import | ast.ImportFrom, package: list[str], known: Mapping[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [_own_or_foreign(alias.name) for alias in node.names]
    if node.level:
        base = package[: len(package) - node.level + 1]
        name = ".".join([PACKAGE, *base, *([node.module] if node.module else [])])
    else:
        name = node.module or ""
    if name.split(".")[0] != PACKAGE:
        return [_own_or_foreign(name)]
    own = name[len(PACKAGE) + 1 :]
    # `from package import module` names that module, `from module import thing` the thing's module.
    longer = [f"{own}.{alias.name}".lstrip(".") for alias in node.names]
    return sorted({name if name in known else (own or "__init__") for name in longer})


def _own_or_foreign(name: str) -> str:
    if name == PACKAGE:
        return "__init__"
    return name[len(PACKAGE) + 1 :] if name.startswith(PACKAGE + ".") else ":" + name.split(".")[0]


def _is_below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def check_table(root: Path) -> list[str]:
    """Own imports follow ALLOWED and LAZY, and every unit has a row."""
    problems = []
    for unit in sorted({module.split(".")[0] for module in modules(root)}):
        if unit not in (*L0, *TOP, *ALLOWED):
            problems.append(f"{unit}: not in the import table")
    for entry in imports(root):
        unit = entry.module.split(".")[0]
        if entry.target.startswith(":") or unit in TOP or _is_below(entry.target, unit):
            continue
        allowed = L0 if unit in L0 else (*L0, *ALLOWED.get(unit, ()))
        if entry.is_lazy:
            allowed = (*allowed, *LAZY.get(entry.module, ()))
        if not any(_is_below(entry.target, prefix) for prefix in allowed):
            how = "in a function" if entry.is_lazy else "at import time"
            problems.append(f"{entry.module}:{entry.line} imports {entry.target} {how}")
    return problems


def check_foreign(root: Path) -> list[str]:
    """Third-party imports stay where they belong: torch, transformers, asyncio and the needs of L0."""
    problems = []
    for entry in imports(root):
        if not entry.target.startswith(":"):
            continue
        name, unit = entry.target[1:], entry.module.split(".")[0]
        is_stdlib = name in sys.stdlib_module_names
        reasons = {
            "torch in a torch-free unit": name in ("torch", "triton")
            and any(_is_below(entry.module, prefix) for prefix in TORCH_FREE),
            "only late, in frontend.tokenizer": name == "transformers"
            and not (entry.is_lazy and entry.module == "frontend.tokenizer"),
            "the scheduler is synchronous": unit == "scheduler" and name == "asyncio",
            "L0 has stdlib, numpy and msgspec": unit in L0
            and not is_stdlib
            and name not in ("numpy", "msgspec"),
            "kernels have torch and triton": unit == "kernels"
            and not is_stdlib
            and name not in ("torch", "triton"),
        }
        problems += [
            f"{entry.module}:{entry.line} imports {name}: {reason}"
            for reason, is_bad in reasons.items()
            if is_bad
        ]
    return problems


def check_cuda(root: Path) -> list[str]:
    """`torch.cuda` appears only in CUDA_MODULES."""
    problems = []
    for module, path in modules(root).items():
        if any(_is_below(module, prefix) for prefix in CUDA_MODULES):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [f"{node.value.id}.{node.attr}"]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            if any(_is_below(name, "torch.cuda") for name in names):
                problems.append(f"{module}:{node.lineno} uses torch.cuda")
    return problems


def check_cycles(root: Path) -> list[str]:
    """No module needs itself at import time, over any number of steps."""
    edges: dict[str, set[str]] = {module: set() for module in modules(root)}
    for entry in imports(root):
        if entry.target in edges and not entry.is_lazy and entry.target != entry.module:
            edges[entry.module].add(entry.target)
    problems: list[str] = []
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            problems.append("cycle: " + " -> ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for target in sorted(edges[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())
    return problems
