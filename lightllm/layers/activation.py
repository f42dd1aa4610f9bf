"""Gated activations of the MLP."""

from torch import Tensor
from torch.nn import functional

from lightllm.errors import ModelLoadError


def check_activation(name: str) -> None:
    """Refuse every `hidden_act` but silu, the only one whose gated form is here.

    Raises:
        ModelLoadError: naming what the config asks for.
    """
    if name not in ("silu", "swish"):
        raise ModelLoadError(f"config.json: hidden_act: got {name!r}, supported is 'silu'")


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, for [..., 2 * n] with the gate in the first half; a new tensor [..., n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
