"""Choosing a backend at start."""

import dataclasses
from types import MappingProxyType
from typing import ClassVar

import msgspec
import pytest
import torch

from lightllm.attention import registry
from lightllm.attention.base import AttentionLayer
from lightllm.attention.cpu import CpuAttention
from lightllm.attention.registry import select_backend
from lightllm.device.forward_batch import ForwardBatch
from lightllm.errors import ConfigError
from lightllm.model_config import ModelConfig
from tests.native.available import library_or_skip

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=576,
    intermediate_size=8,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=8,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
)


class Wrong(CpuAttention):
    """A backend that computes nonsense."""

    name: ClassVar[str] = "wrong"

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: AttentionLayer, batch: ForwardBatch
    ) -> torch.Tensor:
        return super().forward(q, k, v, layer, batch) * torch.nan


class Shortsighted(CpuAttention):
    """A backend that knows no windows."""

    name: ClassVar[str] = "shortsighted"

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: AttentionLayer, batch: ForwardBatch
    ) -> torch.Tensor:
        return super().forward(q, k, v, dataclasses.replace(layer, window=None), batch)


class Lacking(CpuAttention):
    """A backend that needs what this torch does not have."""

    name: ClassVar[str] = "lacking"

    def plan(self, batch: ForwardBatch) -> object:
        return torch.ops.aten._no_such_attention(batch.positions)


class Forgetful(CpuAttention):
    """A backend that keeps no keys."""

    name: ClassVar[str] = "forgetful"

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: AttentionLayer, batch: ForwardBatch
    ) -> torch.Tensor:
        out = super().forward(q, k, v, layer, batch)
        batch.kv_pool.k[layer.index].zero_()
        return out


def with_first(monkeypatch: pytest.MonkeyPatch, cls: type[CpuAttention]) -> None:
    rows = {cls.name: f"broken:{cls.__name__}", "torch_ref": registry.BACKENDS["torch_ref"]}
    monkeypatch.setattr(registry, "BACKENDS", MappingProxyType(rows))
    load = registry.load_backend
    monkeypatch.setattr(
        registry,
        "load_backend",
        lambda name, library=None: cls() if name == cls.name else load(name, library),
    )


@pytest.mark.parametrize("name", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fast_one_passes(name: str, dtype: torch.dtype) -> None:
    backend, reason = select_backend(name, CONFIG, dtype)
    assert backend.name == "torch"
    assert reason == "agrees with torch_ref on random data"


def test_the_kernels_come_first_where_they_can_compute() -> None:
    library = library_or_skip()
    assert select_backend("auto", CONFIG, torch.float32, library)[0].name == "native"
    backend, reason = select_backend("auto", CONFIG, torch.bfloat16, library)
    assert backend.name == "torch"
    assert reason.startswith("native: computes float32")
    with pytest.raises(ConfigError, match="native: computes float32"):
        select_backend("native", CONFIG, torch.bfloat16, library)
    with pytest.raises(ConfigError, match="the C kernels are not in use"):
        select_backend("native", CONFIG, torch.float32)


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"got triton, usable on a CPU are auto, native, torch"):
        select_backend("triton", CONFIG, torch.float32)


@pytest.mark.parametrize(
    ("cls", "problem"),
    [(Wrong, "results differ"), (Lacking, "_no_such_attention"), (Forgetful, "not in their slots")],
)
def test_auto_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, cls: type[CpuAttention], problem: str
) -> None:
    with_first(monkeypatch, cls)
    backend, reason = select_backend("auto", CONFIG, torch.float32)
    assert backend.name == "torch_ref"
    assert reason.startswith(f"{cls.name} failed its self-check")
    assert problem in reason


def test_a_named_one_that_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_first(monkeypatch, Wrong)
    with pytest.raises(ConfigError, match=r"wrong failed its self-check.*use --attention_backend auto"):
        select_backend("wrong", CONFIG, torch.float32)


def test_every_kind_of_layer_that_the_model_has_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with_first(monkeypatch, Shortsighted)
    assert select_backend("auto", CONFIG, torch.float32)[0].name == "shortsighted"
    layer_types = ["full_attention"] * 29 + ["sliding_attention"]
    config = msgspec.structs.replace(CONFIG, sliding_window=4096, layer_types=layer_types)
    assert select_backend("auto", config, torch.float32)[0].name == "torch_ref"
