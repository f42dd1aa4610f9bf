"""Worker: loads a model onto its device, sizes the KV pool and runs batches.

One worker is one rank. With tp 1 it lives in a thread of the engine process. Owns all tensors; its decisions
(device, compute dtype, attention backend, KV capacity) are logged once with their reasons, as the memory
ledger at start.
"""

import dataclasses
import logging
import time
from collections.abc import Callable

import torch

from lightllm.attention.base import AttentionBackend
from lightllm.attention.registry import select_backend, select_cuda_backend
from lightllm.cluster_link import new_epoch
from lightllm.config import Config
from lightllm.device.base import Device, make_device
from lightllm.device.kv_pool import KVPool
from lightllm.distributed.parallel_state import Parallel
from lightllm.distributed.shares import share_out
from lightllm.layers.native_ops import NativeOps
from lightllm.layers.ops import Ops
from lightllm.messages import EngineInfo, ScheduledBatch
from lightllm.model_config import ModelConfig
from lightllm.models import load_model
from lightllm.models.base import Model
from lightllm.native.library import NativeLibrary, NativeUnavailable
from lightllm.weights.base import WeightSource
from lightllm.worker.inputs import RowTables
from lightllm.worker.kv_exchange import ExchangingRunner, open_kv_link
from lightllm.worker.memory import graph_sizes, num_kv_slots, plan_memory, prompt_graph_sizes
from lightllm.worker.model_runner import LaunchedStep, ModelRunner, Runner
from lightllm.worker.quantization import quantized
from lightllm.worker.token_choice import make_choice

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told the stage, how much of it is done and how much there is."""


class Worker:
    """One rank: model, KV pool and row tables."""

    def __init__(self, runner: Runner, device: Device, info: EngineInfo) -> None:
        self._runner = ExchangingRunner(runner, device)
        self._info = info

    @classmethod
    def load(
        cls,
        config: Config,
        model_config: ModelConfig,
        source: WeightSource,
        progress: Progress,
        *,
        device: Device | None = None,
        parallel: Parallel | None = None,
    ) -> "Worker":
        """Load everything, or this rank's part; the calling thread is the one that must call `launch`.

        Raises:
            ConfigError: the device or the attention backend cannot be used.
            ModelLoadError: the weights do not fit the config, or the memory.
        """
        started = time.perf_counter()
        device = device or make_device(config.engine.device)
        parallel = parallel or Parallel()
        dtype, reason = _choose_dtype(config, model_config, device)
        logger.info("computing in %s: %s", _name(dtype), reason)
        device.prepare()
        backend, ops = _choose(config, model_config, dtype, device, parallel)
        free = _own_share(device, parallel)
        max_len = min(config.engine.max_req_total_len, model_config.max_context_len)
        reading = time.perf_counter()
        model = load_model(
            model_config,
            quantized(source, config.model.quant_type, model_config),
            dtype=dtype,
            device=device.torch_device,
            backend=backend,
            ops=ops,
            num_threads=max(1, config.environment.loadworker // parallel.local_size),
            progress=lambda done, total: progress("loading weights", done, total),
            max_len=max_len,
            packed=_keeps_packed(config, ops),
            parallel=parallel,
        )
        _say_speed(model.num_bytes, time.perf_counter() - reading)
        # Two pools of threads would fight for the cores: beside one of its own kernels torch has one thread.
        num_threads = config.environment.omp_num_threads if ops.uses_torch_threads else 1
        logger.info("torch computes on %s", device.prepare_to_compute(num_threads))
        ledger = plan_memory(config, model.config, dtype, device, free, model.num_bytes)
        # A slot has the same number on all ranks.
        num_slots = parallel.collectives.smallest(num_kv_slots(config, model.config, dtype, ledger))
        # Slot 0 is the padding dummy.
        pool = KVPool(model.config, num_slots + 1, dtype, device.torch_device)
        logger.info("memory: %s", dataclasses.replace(ledger, kv=pool.num_bytes))
        max_len = min(max_len, num_slots)
        info = EngineInfo(
            device=device.name,
            dtype=_name(dtype),
            kv_total_tokens=num_slots,
            max_req_total_len=max_len,
            vocab_size=model_config.vocab_size,
            load_s=time.perf_counter() - started,
            attention_backend=backend.name,
        )
        return cls(_make_runner(config, device, model, backend, pool, max_len, parallel), device, info)

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Start one batch; its result may be taken in another thread."""
        return self._runner.launch(batch)

    def open_kv_link(
        self, config: Config, model_config: ModelConfig, hashes: tuple[str, str], parallel: Parallel
    ) -> None:
        """Let KV move between this node and others, whose hashes of model and tokenizer must be the same.

        Raises:
            ConfigError: this device or transport cannot, or the cluster token cannot be used.
            BindError: --kv_port is taken.
        """
        epoch = parallel.collectives.smallest(new_epoch())  # one number for all ranks
        rank = parallel.rank
        self._info = open_kv_link(self._runner, self._info, config, model_config, hashes, rank, epoch)

    def watch(self, on_news: Callable[[], None]) -> None:
        """Have that called, in any thread, when a transfer has ended of which the next batch will tell."""
        self._runner.transport.watch(on_news)

    def close(self) -> None:
        """End transfers that still run; peers hear of it at once."""
        self._runner.transport.close()

    def info(self) -> EngineInfo:
        """What was loaded, where, and its capacity."""
        return self._info


def _choose_dtype(config: Config, model_config: ModelConfig, device: Device) -> tuple[torch.dtype, str]:
    if config.model.quant_type != "none" and config.model.dtype == "auto":
        return torch.float32, f"what kernels on weights of --quant_type {config.model.quant_type} compute in"
    return device.choose_dtype(config.model.dtype, model_config.dtype)


def _keeps_packed(config: Config, ops: Ops) -> bool:
    """Whether quantised weights stay so: where that is fast, unless a dtype is asked for; and where asked."""
    if config.model.quant_type != "none" and not ops.computes_packed:
        logger.warning(
            "--quant_type %s without C kernels: weights are unpacked anew in every step, which takes seconds "
            "for each billion of them; install a C compiler and the package again, or leave --quant_type out",
            config.model.quant_type,
        )
    return config.model.quant_type != "none" or (ops.computes_packed and config.model.dtype == "auto")


def _say_speed(num_bytes: int, seconds: float) -> None:
    speed = num_bytes / 1e9 / seconds
    logger.info("read %.2f GB of weights in %.2f s: %.1f GB/s", num_bytes / 1e9, seconds, speed)


def _own_share(device: Device, parallel: Parallel) -> int:
    """Free memory for this rank: a GPU is its own, the RAM belongs to all ranks of the machine."""
    free = device.free_memory_bytes()
    parallel.collectives.smallest(0)  # no rank loads before all have measured
    return free // parallel.local_size if device.name == "cpu" else free


def _choose(
    config: Config, model_config: ModelConfig, dtype: torch.dtype, device: Device, parallel: Parallel
) -> tuple[AttentionBackend, Ops]:
    """The attention backend for this rank's heads, and the operations of its device; the reason is logged."""
    name = config.engine.attention_backend
    model_config = share_out(model_config, {}, parallel.rank, parallel.size).config
    if device.name == "cuda":
        from lightllm.layers.triton_ops import TritonOps  # needs triton, which a CPU does not

        backend, reason = select_cuda_backend(name, model_config, dtype, device.torch_device)
        ops: Ops = TritonOps()
    else:
        library = _native_library(config, dtype)
        backend, reason = select_backend(name, model_config, dtype, library)
        ops = Ops() if library is None else NativeOps(library)
    logger.info("attention backend %s: %s; operations: %s", backend.name, reason, ops.name)
    return backend, ops


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


def _make_runner(
    config: Config,
    device: Device,
    model: Model,
    backend: AttentionBackend,
    pool: KVPool,
    max_len: int,
    parallel: Parallel,
) -> Runner:
    max_rows = config.engine.running_max_req_size
    rank, size, collectives = parallel.rank, parallel.size, parallel.collectives
    choice = make_choice(rank, size, collectives)
    if not device.is_async:
        return ModelRunner(model, backend, pool, RowTables(max_rows, max_len), choice)
    from lightllm.attention.triton_gqa import TritonAttention  # these need triton
    from lightllm.worker.cuda_graph import GraphMemory
    from lightllm.worker.decode_graphs import DecodeGraphs
    from lightllm.worker.device_runner import DeviceRunner
    from lightllm.worker.device_sampler import make_sampler
    from lightllm.worker.device_tables import DeviceTables
    from lightllm.worker.prompt_graphs import PromptGraphs

    tables = DeviceTables(max_rows, max_len, device)
    graphs = prompt_graphs = None
    if not config.graph.disable_cudagraph:
        longest, memory = config.graph.graph_max_len_in_batch or max_len, GraphMemory()
        graphs = DecodeGraphs(
            model,
            backend,
            pool,
            tables,
            memory,
            sizes=graph_sizes(config),
            max_len=min(longest, max_len),
            vocab_size=model.config.vocab_size if parallel.is_leader else 0,
        )
        sizes = prompt_graph_sizes(config, max_len)
        if sizes and isinstance(backend, TritonAttention):
            prompt_graphs = PromptGraphs(model, backend, pool, tables, device, memory, sizes=sizes)
    sampler = make_sampler(rank, size, tables, device, collectives)
    return DeviceRunner(model, backend, pool, tables, device, graphs, sampler, choice, prompt_graphs)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
