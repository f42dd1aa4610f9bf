"""PD is data: what schedules and computes does not ask which role its node has."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lightllm"
FOLDERS = (
    "scheduler",
    "engine",
    "worker",
    "transfer",
    "models",
    "layers",
    "attention",
    "device",
    "distributed",
)
NAMES = {"role", "run_mode"}


def comparisons(source: str) -> list[int]:
    """Lines in which a role is compared with anything."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare | ast.Match):
            names = {getattr(part, "attr", getattr(part, "id", "")) for part in ast.walk(node)}
            found += [node.lineno] if names & NAMES else []
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_branch_on_the_role(folder: str) -> None:
    files = sorted((PACKAGE / folder).glob("*.py"))
    assert files
    assert {path.name: lines for path in files if (lines := comparisons(path.read_text()))} == {}


def test_the_check_can_fail() -> None:
    assert comparisons('x = 1\nif config.server.run_mode == "prefill":\n    pass') == [2]
    assert comparisons('y = [n for n in nodes if n.role in ("decode",)]') == [1]
