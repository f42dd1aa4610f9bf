"""The page docs/models.md, made from the registry: `python -m lightllm.models.document > docs/models.md`.

A test holds the page to what this makes. Not part of a running server.
"""

import inspect
import sys
from collections.abc import Mapping

from lightllm.layers.rotary import SCALINGS
from lightllm.model_config import TEXT_ARCHITECTURES
from lightllm.models import ARCHITECTURES, model_class
from lightllm.models.decoder import OPTIONS

HEAD = """# Models

<!-- Made by `python -m lightllm.models.document`; edit lightllm/models/ instead. -->

Which model a checkpoint is, its `config.json` says (`architectures`), or the metadata of a GGUF file
(`general.architecture`). Each row is compared with transformers on tiny random models: logits in float32
within 1e-4 for whole prompts, prompts in chunks, single tokens, and batches that mix these.

| architecture | models | what it computes | GGUF |
|---|---|---|---|
"""

OPTIONS_HEAD = """
## Options of a config

For all other architectures the key must have the value in the last column; else the model is refused at
start, with the name of the key (exit code 3).

| key | obeyed by | otherwise |
|---|---|---|
"""

ROPE_HEAD = """
## Rotary scaling

Any architecture may have one of these as `rope_type` in `rope_scaling` or `rope_parameters`; other types are
refused. Angles depend on the position of a token only, so that cached prefixes stay valid. For `longrope` the
longest request that the server admits (`--max_req_total_len`) decides between the two lists of factors.

| `rope_type` | what it does |
|---|---|
"""


def document(gguf_architectures: Mapping[str, str]) -> str:
    """Return the page as Markdown.

    Args:
        gguf_architectures: `general.architecture` -> architecture here.
    """
    classes = {name: model_class(name) for name in ARCHITECTURES}
    page = HEAD
    for name, cls in classes.items():
        gguf = ", ".join(f"`{key}`" for key, value in gguf_architectures.items() if value == name) or "-"
        page += f"| `{name}` | {cls.checkpoints} | {_summary(cls)} | {gguf} |\n"
    for outer, inner in TEXT_ARCHITECTURES.items():
        page += f"\nOf a `{outer}`, the language model is served, as `{inner}`."
    page += "\nA GGUF file of InternLM2 has q, k and v apart, and is served as a Llama.\n"
    page += OPTIONS_HEAD
    for option, unused in OPTIONS.items():
        obeyed = [name.removesuffix("ForCausalLM") for name, cls in classes.items() if option in cls.options]
        otherwise = "null" if unused is None else str(unused).lower()
        page += f"| `{option}` | {', '.join(obeyed)} | {otherwise} |\n"
    page += ROPE_HEAD
    for kind, function in sorted(SCALINGS.items()):
        page += f"| `{kind}` | {_summary(function)} |\n"
    return page


def _summary(documented: object) -> str:
    """The first paragraph of a docstring, as one line."""
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())


def main() -> None:
    """Print the page."""
    from lightllm.weights.gguf_config import gguf_architectures

    sys.stdout.write(document(gguf_architectures()))


if __name__ == "__main__":
    main()
