"""The feed-forward half of a decoder layer."""

from torch import Tensor

from lightllm.layers.activation import ACTIVATIONS
from lightllm.layers.linear import LinearMethod
from lightllm.layers.ops import Ops


class GatedMLP:
    """down(act(gate(x)) * up(x)). https://arxiv.org/abs/2002.05202

    Args:
        gate_up: both fused, the gate first: [2 * intermediate_size, hidden_size].
        down: [hidden_size, intermediate_size].
        activation: a config's `hidden_act`.
    """

    def __init__(self, gate_up: LinearMethod, down: LinearMethod, activation: str, ops: Ops) -> None:
        self.gate_up = gate_up
        self.down = down
        self.activation = ACTIVATIONS[activation]
        self.ops = ops

    def __call__(self, x: Tensor) -> Tensor:
        """Map [num_tokens, hidden_size] to a new tensor of the same shape."""
        return self.ops.gated_linear(self.activation, self.gate_up(x), self.down)
