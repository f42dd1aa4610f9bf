"""Rotary position embeddings, in the layout of HF models: dimension i is paired with i + rotary_dim / 2.

https://arxiv.org/abs/2104.09864. Angles are float32 and computed once a step, not read from a table: for some
hundred positions that costs microseconds and needs neither memory nor a limit. They depend on a token's
position and on nothing else, so that keys in the pool stay valid however long their sequence grows, and
serve any other sequence with the same prefix.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lightllm.config_keys import Keys
from lightllm.errors import ModelLoadError
from lightllm.model_config import ModelConfig


class RotaryEmbedding:
    """Angles of positions: frequency times position.

    Args:
        frequencies: [rotary_dim / 2] float32, radians per position.
        magnitude: factor of what is rotated; q and k both have it, so scores grow by its square.
    """

    def __init__(self, frequencies: Tensor, magnitude: float = 1.0) -> None:
        self.frequencies = frequencies
        self.magnitude = magnitude

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin for `Ops.rotate_`, each [n, rotary_dim / 2] float32, of positions [n] int64."""
        angles = self.angles(positions)
        cos, sin = angles.cos(), angles.sin()
        if self.magnitude == 1.0:
            return cos, sin
        return cos.mul_(self.magnitude), sin.mul_(self.magnitude)

    def angles(self, positions: Tensor) -> Tensor:
        """Angles [n, rotary_dim / 2] float32 in radians."""
        return positions[:, None].float() * self.frequencies_on(positions.device)

    def frequencies_on(self, device: torch.device) -> Tensor:
        """Return the frequencies on a device, where they stay: a copy in each step would wait for it."""
        if self.frequencies.device != device:
            self.frequencies = self.frequencies.to(device)
        return self.frequencies


class DynamicRotaryEmbedding(RotaryEmbedding):
    """A base that grows with the position, from the end of the trained context on ("dynamic NTK").

    The base of position p is the one that a sequence of p + 1 tokens calls for. So a token's key is the same
    as if the sequence had been decoded token by token; transformers, which computes a prompt with the base of
    its whole length, differs beyond the trained context.

    Args:
        theta: base within the trained context.
        rotary_dim: elements of a head that are rotated.
        factor: how much longer sequences are meant to become.
        trained_len: length of the trained context.
    """

    def __init__(self, theta: float, rotary_dim: int, factor: float, trained_len: int) -> None:
        super().__init__(plain_frequencies(theta, rotary_dim))
        self.factor = factor
        self.trained_len = trained_len
        # The base becomes theta * stretch ** (d / (d - 2)); as a power of the frequencies, with
        # theta ** x = stretch ** (d / (d - 2)), these become frequencies ** (1 + x).
        self.growth = rotary_dim / (rotary_dim - 2) / math.log(theta)

    def angles(self, positions: Tensor) -> Tensor:
        """See the base class."""
        lengths = (positions[:, None] + 1).clamp(min=self.trained_len).float()
        stretch = self.factor * lengths / self.trained_len - (self.factor - 1)  # [n, 1], 1 when trained
        frequencies = self.frequencies_on(positions.device) ** (1 + self.growth * stretch.log())
        return positions[:, None].float() * frequencies


def rotary_embedding(config: ModelConfig, max_len: int) -> RotaryEmbedding:
    """Make the rotary embedding that the config asks for.

    Args:
        config: `rope_theta`, `rope_scaling`, `partial_rotary_factor` and what they refer to.
        max_len: of the longest sequence there will be.

    Raises:
        ModelLoadError: `rope_scaling` is of a type that is not built, or lacks a value.
    """
    if config.rope_scaling is None:
        return RotaryEmbedding(plain_frequencies(config.rope_theta, config.rotary_dim))
    keys = Keys(config.rope_scaling, "config.json: rope_scaling")
    kind = keys.text("rope_type")
    if kind not in SCALINGS:
        known = ", ".join(sorted(SCALINGS))
        raise ModelLoadError(f"{keys.origin}: got rope_type {kind!r}, supported are {known}")
    return SCALINGS[kind](config, keys, max_len)


def local_rotary_embedding(config: ModelConfig) -> RotaryEmbedding:
    """Make that of layers with a sliding window, which may have a base of their own and is never scaled."""
    theta = config.rope_local_base_freq or config.rope_theta
    return RotaryEmbedding(plain_frequencies(theta, config.rotary_dim))


def plain_frequencies(theta: float, rotary_dim: int) -> Tensor:
    """Return theta ** (-2 i / rotary_dim) for each pair i, [rotary_dim / 2] float32.

    Raises:
        ModelLoadError: numbers that are none of a rotation.
    """
    if theta <= 1.0:
        raise ModelLoadError(f"config.json: rope_theta: got {theta}, expected a number above 1")
    if rotary_dim < 4 or rotary_dim % 2:
        raise ModelLoadError(
            f"config.json: partial_rotary_factor: rotates {rotary_dim} elements of a head, "
            "expected an even number above 2"
        )
    exponents = torch.arange(0, rotary_dim, 2).float() / rotary_dim
    return 1.0 / theta**exponents


# ---------------------------------------------------------------- one function for each type of scaling


def _linear(config: ModelConfig, keys: Keys, max_len: int) -> RotaryEmbedding:
    """Positions closer together by `factor`. https://arxiv.org/abs/2306.15595"""
    plain = plain_frequencies(config.rope_theta, config.rotary_dim)
    return RotaryEmbedding(plain / keys.number("factor"))


def _dynamic(config: ModelConfig, keys: Keys, max_len: int) -> RotaryEmbedding:
    """A base that grows with the position, from the end of the trained context on.

    See DynamicRotaryEmbedding.
    """
    return DynamicRotaryEmbedding(
        config.rope_theta, config.rotary_dim, keys.number("factor"), config.max_position_embeddings
    )


def _llama3(config: ModelConfig, keys: Keys, max_len: int) -> RotaryEmbedding:
    """Slow frequencies divided by `factor`, fast ones kept, those between blended (Llama 3.1).

    What is slow or fast is told by how many turns a frequency makes within the original context.
    """
    plain = plain_frequencies(config.rope_theta, config.rotary_dim)
    original = _original_context(keys)
    low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
    if low >= high:
        raise ModelLoadError(f"{keys.origin}: low_freq_factor: got {low}, expected less than {high}")
    turns = plain * (original / (2 * math.pi))
    share_kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return RotaryEmbedding(torch.lerp(plain / keys.number("factor"), plain, share_kept))


def _yarn(config: ModelConfig, keys: Keys, max_len: int) -> RotaryEmbedding:
    """As llama3 with a ramp over dimensions instead of turns, and larger scores. https://arxiv.org/abs/2309.00071

    The ramp lies between the dimensions that make `beta_fast` and `beta_slow` turns in the original context.
    """
    dim, theta = config.rotary_dim, config.rope_theta
    plain = plain_frequencies(theta, dim)
    original = _original_context(keys, config.max_position_embeddings)
    factor = keys.number("factor", config.max_position_embeddings / original)
    ends = [
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (keys.number("beta_fast", 32.0), keys.number("beta_slow", 1.0))
    ]
    if keys.boolean("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], dim - 1)
    width = last - first or 0.001  # a step, where the ramp has no width
    share_scaled = ((torch.arange(dim // 2).float() - first) / width).clamp(0.0, 1.0)
    return RotaryEmbedding(torch.lerp(plain, plain / factor, share_scaled), _yarn_magnitude(keys, factor))


def _yarn_magnitude(keys: Keys, factor: float) -> float:
    stated = keys.optional_number("attention_factor")
    if stated is not None:
        return stated

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    over, under = keys.optional_number("mscale"), keys.optional_number("mscale_all_dim")
    return growth(1.0) if over is None or under is None else growth(over) / growth(under)


def _longrope(config: ModelConfig, keys: Keys, max_len: int) -> RotaryEmbedding:
    """A divisor for each frequency, from one of two lists (Phi-3). https://arxiv.org/abs/2402.13753

    The lists are for sequences within and beyond the original context. Keys rotated by one do not fit
    queries rotated by the other, so `max_len` decides for all sequences.
    """
    plain = plain_frequencies(config.rope_theta, config.rotary_dim)
    original = _original_context(keys)
    name = "long_factor" if max_len > original else "short_factor"
    divisors = keys.sequence(name)
    if len(divisors) != len(plain) or not all(_is_positive(divisor) for divisor in divisors):
        raise ModelLoadError(
            f"{keys.origin}: {name}: got {divisors!r:.60} ({len(divisors)}), expected {len(plain)} numbers "
            "above 0"
        )
    factor = keys.number("factor", config.max_position_embeddings / original)
    implied = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    magnitude = keys.optional_number("attention_factor")
    return RotaryEmbedding(
        plain / torch.tensor(divisors).float(), implied if magnitude is None else magnitude
    )


def _original_context(keys: Keys, default: int | None = None) -> int:
    length = keys.positive("original_max_position_embeddings", default)
    if length == 1:
        raise ModelLoadError(f"{keys.origin}: original_max_position_embeddings: got 1, expected more")
    return length


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 < value < math.inf


Scaling = Callable[[ModelConfig, Keys, int], RotaryEmbedding]
SCALINGS: Mapping[str, Scaling] = MappingProxyType(
    {"dynamic": _dynamic, "linear": _linear, "llama3": _llama3, "longrope": _longrope, "yarn": _yarn}
)
