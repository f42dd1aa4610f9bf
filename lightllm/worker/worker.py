"""Worker: loads a model onto its device, sizes the KV pool and runs batches.

One worker is one rank. With tp 1 it lives in a thread of the engine process. Owns all tensors; its decisions
(compute dtype, attention backend, KV capacity) are logged once with their reasons, as the memory ledger at
start.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightllm.attention.registry import select_backend
from lightllm.config import Config
from lightllm.device import device as cpu
from lightllm.device.kv_pool import KVPool, kv_bytes_per_token
from lightllm.errors import ModelLoadError
from lightllm.layers.native_ops import NativeOps
from lightllm.layers.ops import Ops
from lightllm.messages import EngineInfo, ScheduledBatch, StepOutput
from lightllm.model_config import ModelConfig
from lightllm.models import load_model
from lightllm.native.library import NativeLibrary, NativeUnavailable
from lightllm.weights.base import WeightSource
from lightllm.worker.inputs import RowTables
from lightllm.worker.model_runner import ModelRunner

logger = logging.getLogger(__name__)

DEFAULT_KV_BYTES = 2 * 1024**3
WORKSPACE_BYTES = 64 * 1024**2
MIB = 1024**2

Progress = Callable[[str, int, int], None]
"""Told the stage, how much of it is done and how much there is."""


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """Where the memory goes, in bytes. `free` is what the machine had before loading."""

    free: int
    weights: int
    kv: int
    logits: int

    def __str__(self) -> str:
        parts = [("weights", self.weights), ("KV, up to", self.kv), ("largest logits", self.logits)]
        parts += [("workspace", WORKSPACE_BYTES), ("free before loading", self.free)]
        return ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in parts)


class Worker:
    """One rank: model, KV pool and row tables."""

    def __init__(self, runner: ModelRunner, info: EngineInfo) -> None:
        self._runner = runner
        self._info = info

    @classmethod
    def load(
        cls, config: Config, model_config: ModelConfig, source: WeightSource, progress: Progress
    ) -> "Worker":
        """Load everything; the calling thread is the one that must call `run`.

        Raises:
            ModelLoadError: the weights do not fit the config, or the memory.
        """
        started = time.perf_counter()
        dtype, reason = cpu.choose_dtype(config.model.dtype, model_config.dtype)
        logger.info("computing in %s: %s", _name(dtype), reason)
        cpu.set_threads(1)  # the loader's threads would each bring a team of their own
        library = _native_library(config, dtype)
        ops = Ops() if library is None else NativeOps(library)
        backend, reason = select_backend(config.engine.attention_backend, model_config, dtype, library)
        logger.info("attention backend %s: %s", backend.name, reason)
        free = cpu.free_memory_bytes()
        max_len = min(config.engine.max_req_total_len, model_config.max_context_len)
        model = load_model(
            model_config,
            source,
            dtype=dtype,
            backend=backend,
            ops=ops,
            num_threads=config.environment.loadworker,
            progress=lambda done, total: progress("loading weights", done, total),
            max_len=max_len,
            packed=library is not None and config.model.dtype == "auto",
        )
        cpu.keep_freed_memory()
        if library is None:  # two pools of threads would fight for the cores
            logger.info("computing on %d threads", cpu.set_threads(config.environment.omp_num_threads))
        logits = config.engine.running_max_req_size * model_config.vocab_size * 4
        num_slots = _num_slots(config, model_config, dtype, free - model.num_bytes - WORKSPACE_BYTES)
        pool = KVPool(model_config, num_slots + 1, dtype)  # slot 0 is the padding dummy
        logger.info("memory: %s", MemoryLedger(free, model.num_bytes, pool.num_bytes, logits))
        max_len = min(max_len, num_slots)
        tables = RowTables(config.engine.running_max_req_size, max_len)
        info = EngineInfo(
            device="cpu",
            dtype=_name(dtype),
            kv_total_tokens=num_slots,
            max_req_total_len=max_len,
            vocab_size=model_config.vocab_size,
            load_s=time.perf_counter() - started,
            attention_backend=backend.name,
        )
        return cls(ModelRunner(model, backend, pool, tables), info)

    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Compute one batch."""
        return self._runner.run(batch)

    def info(self) -> EngineInfo:
        """What was loaded, where, and its capacity."""
        return self._info


def _native_library(config: Config, dtype: torch.dtype) -> NativeLibrary | None:
    """The C kernels, unless they are not wanted, not there, or of no use for the dtype."""
    if config.engine.attention_backend not in ("auto", "native"):
        return None
    if dtype != torch.float32:
        logger.info("C kernels: not used, they compute float32 and this is %s", _name(dtype))
        return None
    try:
        library = NativeLibrary(config.environment.omp_num_threads or torch.get_num_threads())
    except NativeUnavailable as error:
        logger.warning("C kernels: %s; computing in plain torch, which is slower", error)
        return None
    logger.info("C kernels: %s on %d threads", library.kernels, library.num_threads)
    return library


def _num_slots(config: Config, model: ModelConfig, dtype: torch.dtype, free_bytes: int) -> int:
    """KV capacity in tokens: as asked, or what half of the free memory holds, at most 2 GiB.

    Raises:
        ModelLoadError: what was asked does not fit; the message says what does.
    """
    per_token = kv_bytes_per_token(model, dtype)
    asked = config.engine.max_total_token_num
    if asked is not None:
        fits = max(0, int(free_bytes * config.engine.mem_fraction)) // per_token
        if asked > fits:
            raise ModelLoadError(
                f"--max_total_token_num {asked} needs {asked * per_token / MIB:.0f} MiB of KV "
                f"({per_token} bytes a token); {fits} tokens fit into the free memory; lower it, or raise "
                "--mem_fraction"
            )
        return asked
    budget = min(DEFAULT_KV_BYTES, int(free_bytes * 0.5 * config.engine.mem_fraction))
    num_slots = budget // per_token
    if num_slots < 2:
        raise ModelLoadError(
            f"{max(budget, 0) / MIB:.0f} MiB are left for KV beside the weights, and one token needs "
            f"{per_token} bytes; free memory or choose a smaller model"
        )
    return num_slots


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
