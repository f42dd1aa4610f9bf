"""Mistral."""

from typing import ClassVar

from lightllm.models.decoder import Decoder


class MistralForCausalLM(Decoder):
    """As Llama, with a sliding window in all layers where the config has one."""

    checkpoints: ClassVar[str] = "Mistral 7B, Nemo, Small"
    options: ClassVar[frozenset[str]] = frozenset({"sliding_window"})
