"""Whether FlashInfer's kernels can be used, by a stand-in for the package: nothing compiles here."""

import dataclasses
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
import torch

from lightllm.attention import flashinfer_kernels
from lightllm.attention.flashinfer_kernels import load_kernels
from tests.attention.test_conformance import config

MODEL = config(32, 8, 128)
GPU = torch.device("cuda")


@dataclasses.dataclass
class Library:
    """What FlashInfer calls a JitSpec."""

    variant: tuple[object, ...]
    is_compiled: bool
    build_dir: Path = Path("cache/libraries/name")


class StandIn:
    """The functions of the package that are called, with a list of what they did.

    Args:
        is_compiled: all libraries are there already.
        failure: of the compiler.
    """

    def __init__(self, is_compiled: bool, failure: str = "") -> None:
        self.is_compiled = is_compiled
        self.failure = failure
        self.loaded: list[tuple[object, ...]] = []

    def gen_batch_prefill_module(self, kernels: str, *variant: object) -> Library:
        assert kernels == "fa3"
        return Library(variant, self.is_compiled)

    def get_batch_prefill_module(self, kernels: str, *variant: object) -> None:
        assert kernels == "fa3"
        if self.failure:
            raise RuntimeError(self.failure)
        self.loaded.append(variant)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "StandIn":
        names = ("flashinfer", "flashinfer.jit", "flashinfer.prefill")
        package, jit, prefill = (ModuleType(name) for name in names)
        package.__spec__ = ModuleSpec("flashinfer", None)
        jit.gen_batch_prefill_module = self.gen_batch_prefill_module
        prefill.get_batch_prefill_module = self.get_batch_prefill_module
        for name, module in zip(names, (package, jit, prefill), strict=True):
            monkeypatch.setitem(sys.modules, name, module)
        return self


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_kernels, "compute_capability", lambda device: (9, 0))


def test_other_cards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    StandIn(is_compiled=True).install(monkeypatch)
    monkeypatch.setattr(flashinfer_kernels, "compute_capability", lambda device: (8, 6))
    problem = load_kernels(MODEL, torch.bfloat16, GPU, may_compile=True)
    assert problem == "flashinfer: its kernels are for compute capability 9.0, this card has 8.6"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.float32), (80, torch.bfloat16)])
def test_other_shapes_are_refused(monkeypatch: pytest.MonkeyPatch, head_dim: int, dtype: torch.dtype) -> None:
    StandIn(is_compiled=True).install(monkeypatch)
    problem = load_kernels(config(32, 8, head_dim), dtype, GPU, may_compile=True)
    assert problem is not None
    assert f"this model has {dtype} and {head_dim}" in problem


@pytest.mark.usefixtures("hopper")
def test_it_may_be_missing_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_kernels.importlib.util, "find_spec", lambda name: None)
    problem = load_kernels(MODEL, torch.bfloat16, GPU, may_compile=True)
    assert problem == "flashinfer is not installed (extra `flashinfer`)"
    monkeypatch.undo()
    monkeypatch.setattr(flashinfer_kernels, "compute_capability", lambda device: (9, 0))
    package = ModuleType("flashinfer")
    package.__spec__ = ModuleSpec("flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    problem = load_kernels(MODEL, torch.bfloat16, GPU, may_compile=True)
    assert problem is not None
    assert "No module named 'flashinfer.jit'" in problem


@pytest.mark.usefixtures("hopper")
def test_only_who_asks_for_it_waits_for_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = StandIn(is_compiled=False).install(monkeypatch)
    problem = load_kernels(MODEL, torch.bfloat16, GPU, may_compile=False)
    assert problem is not None
    assert "start once with --attention_backend flashinfer, which takes minutes" in problem
    assert package.loaded == []
    with caplog.at_level("INFO"):
        assert load_kernels(MODEL, torch.bfloat16, GPU, may_compile=True) is None
    assert [variant[7:] for variant in package.loaded] == [(False, False, False)]
    assert "takes minutes" in caplog.text


@pytest.mark.usefixtures("hopper")
def test_a_failed_compilation_is_told_by_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    StandIn(is_compiled=False, failure="noise\n" * 1000 + "nvcc: not found").install(monkeypatch)
    problem = load_kernels(MODEL, torch.bfloat16, GPU, may_compile=True)
    assert problem is not None
    assert problem.endswith("nvcc: not found")
    assert len(problem) < 500


@pytest.mark.usefixtures("hopper")
def test_compiled_kernels_of_every_kind_of_layer_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    package = StandIn(is_compiled=True).install(monkeypatch)
    types = ["full_attention", "sliding_attention"]
    model = msgspec.structs.replace(MODEL, sliding_window=64, layer_types=types, attn_logit_softcapping=50.0)
    assert load_kernels(model, torch.bfloat16, GPU, may_compile=False) is None
    assert [variant[7:] for variant in package.loaded] == [(False, True, False), (True, True, False)]
