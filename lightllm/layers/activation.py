"""Gated activations of the MLP: which there are, by the names of HF configs."""

from collections.abc import Mapping
from types import MappingProxyType

from lightllm.errors import ModelLoadError

# A config's `hidden_act` -> the method of Ops that computes act(gate) * up.
ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        "silu": "silu_and_mul",
        "swish": "silu_and_mul",
        "gelu_new": "gelu_and_mul",
        "gelu_pytorch_tanh": "gelu_and_mul",
    }
)


def check_activation(name: str) -> None:
    """Refuse what is not in the table.

    Raises:
        ModelLoadError: naming what the config asks for and what there is.
    """
    if name not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise ModelLoadError(f"config.json: hidden_act: got {name!r}, supported are {known}")
