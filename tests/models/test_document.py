"""docs/models.md is what the registry makes."""

from pathlib import Path

from lightllm.models import ARCHITECTURES
from lightllm.models.document import document
from lightllm.weights.gguf_config import gguf_architectures

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_is_up_to_date() -> None:
    made = document(gguf_architectures())
    assert PAGE.read_text("utf-8") == made, "run: python -m lightllm.models.document > docs/models.md"


def test_every_architecture_has_a_row() -> None:
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    for name in ARCHITECTURES:
        assert any(row.startswith(f"| `{name}` |") for row in rows)


def test_every_kind_of_gguf_file_has_a_model() -> None:
    assert {*gguf_architectures().values()} <= {*ARCHITECTURES}
