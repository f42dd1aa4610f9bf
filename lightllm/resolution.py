"""From what the user gave to a configuration without open questions: defaults of `auto`, cross rules, stages.

`resolve` is pure: the machine, the environment and the model's dimensions are arguments, nothing is read,
bound or loaded. What only a device can tell (free memory, dtype, attention kernels) stays open for the
worker.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from lightllm.addresses import is_loopback
from lightllm.config import FLAGS, Config, EngineSection, ModelSection, config_from
from lightllm.env import Environment
from lightllm.errors import ConfigError
from lightllm.flag import BUILT_STAGES, MAX_INT, Arguments, FlagSpec
from lightllm.model_config import ModelConfig

GPU_STEP_TOKENS, GPU_CHUNK_TOKENS = 4096, 4096
# About 250 ms of work for two cores, so that aborts and deadlines hold.
CPU_STEP_TOKENS, CPU_CHUNK_TOKENS = 128, 128

WILDCARDS = ("0.0.0.0", "::")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What resolution needs to know of this machine; `server.machine.probe` finds it out.

    `gpu_obstacle` says why the visible GPUs cannot be used with what is installed; empty if they can.
    """

    num_cores: int
    num_physical_cores: int
    num_gpus: int
    gpu_obstacle: str = ""


class Resolution(msgspec.Struct, frozen=True, kw_only=True):
    """A resolved configuration and what has to be said about it, one sentence each.

    `not_built` is what this version refuses; `unchecked` what could not be judged from here.
    """

    config: Config
    warnings: list[str]
    not_built: list[str]
    unchecked: list[str]


def resolve(
    args: Arguments, environment: Environment, machine: Machine, model_config: ModelConfig | None
) -> Resolution:
    """Fill in every `auto` that can be known without loading, and check the rules between flags.

    With `--dry_run` flags that this version does not build are listed; otherwise they are refused.

    Args:
        args: typed values from `cli.parse`.
        environment: variables that are no flags.
        machine: cores and GPUs.
        model_config: dimensions of the model, or None where the model is not at hand: its rules go unchecked.

    Raises:
        ConfigError: flags contradict each other, the machine or the model; both flags are named.
    """
    values, spelled = dict(args.values), dict(args.spelled)
    if environment.moe_mode and "moe_mode" not in values:
        values["moe_mode"], spelled["moe_mode"] = environment.moe_mode, "MOE_MODE"
    config = config_from(values, environment)
    device = _device(config.engine.device, machine)
    not_built = _not_built(config, device, spelled)
    if not_built and not config.server.dry_run:
        raise ConfigError("\n".join(not_built))
    explicit = frozenset(name for name, value in values.items() if value is not None)
    case = _Case(config, explicit, device, machine, model_config)
    for rule in RULES:
        rule(case)
    return Resolution(
        config=_filled_in(case),
        warnings=[*args.warnings, *_warnings(case)],
        not_built=not_built,
        unchecked=_unchecked(case),
    )


class _Case(msgspec.Struct, frozen=True):
    """What every rule may look at: the unresolved configuration, which flags are the user's own, the
    place."""

    config: Config
    explicit: frozenset[str]
    device: str
    machine: Machine
    model_config: ModelConfig | None

    def given(self, *names: str) -> list[str]:
        """Those of `names` that the user set, as flags."""
        return [f"--{name}" for name in names if name in self.explicit]


def _device(wanted: str, machine: Machine) -> str:
    if wanted == "cuda" and not machine.num_gpus:
        raise ConfigError(
            "--device cuda: no GPU is visible; check the driver and CUDA_VISIBLE_DEVICES, or use --device cpu"
        )
    if wanted == "cuda" and machine.gpu_obstacle:
        raise ConfigError(f"--device cuda: {machine.gpu_obstacle}; or use --device cpu")
    if wanted != "auto":
        return wanted
    return "cuda" if machine.num_gpus and not machine.gpu_obstacle else "cpu"


def _not_built(config: Config, device: str, spelled: dict[str, str]) -> list[str]:
    # Values that mean the same as the default, written out.
    computed = {"multinode_port": config.parallel.nccl_port + 1, "advertise_host": config.server.host}
    found = []
    for spec in FLAGS.values():
        if spec.section == "graph" and device == "cpu":
            continue
        value = getattr(getattr(config, spec.section), spec.name)
        stages = dict(spec.flag.choice_stages)
        stage = stages.get(value, spec.flag.stage) if stages else spec.flag.stage
        if stage not in BUILT_STAGES and value != spec.default and value != computed.get(spec.name):
            found.append(_refusal(spec, value, spelled.get(spec.name, "")))
    return found


def _refusal(spec: FlagSpec, value: Any, spelled: str) -> str:
    got = "a secret" if spec.flag.is_secret else ("on" if value is True else str(value))
    plain = f"--{spec.name}"
    source = f" from {spelled}" if spelled.replace("-", "_") != plain.replace("-", "_") else ""
    default = spec.default_text
    return f"{plain}: not implemented in this version (got {got}{source}; leave it out, default {default})"


# ---------------------------------------------------------------- rules between flags; each names both


def _check_shape(case: _Case) -> None:
    parallel = case.config.parallel
    if parallel.tp % parallel.nnodes:
        raise ConfigError(
            f"--tp {parallel.tp} and --nnodes {parallel.nnodes}: every machine holds the same number of "
            "ranks; make --tp a multiple of --nnodes"
        )
    if parallel.node_rank >= parallel.nnodes:
        raise ConfigError(
            f"--node_rank {parallel.node_rank} and --nnodes {parallel.nnodes}: allowed ranks are "
            f"0..{parallel.nnodes - 1}"
        )
    if parallel.tp % parallel.dp:
        raise ConfigError(f"--tp {parallel.tp} and --dp {parallel.dp}: make --tp a multiple of --dp")
    local = parallel.tp // parallel.nnodes
    if case.device == "cuda" and case.machine.num_gpus < local:
        raise ConfigError(
            f"--tp {parallel.tp} and --nnodes {parallel.nnodes} need {local} GPUs here, "
            f"{case.machine.num_gpus} are visible; lower --tp or check CUDA_VISIBLE_DEVICES"
        )


def _check_model(case: _Case) -> None:
    parallel, model = case.config.parallel, case.config.model
    heads = case.model_config.num_attention_heads if case.model_config else parallel.tp
    if parallel.tp > heads:
        raise ConfigError(
            f"--tp {parallel.tp} and --model_dir {model.model_dir}: its {heads} heads cannot be spread over "
            f"{parallel.tp} ranks; values that work are 1..{heads}"
        )
    if (parallel.mtp_mode == "none") != (parallel.mtp_step is None):
        raise ConfigError(
            f"--mtp_mode {parallel.mtp_mode} and --mtp_step {parallel.mtp_step or 'none'}: give both or "
            "neither"
        )
    if model.quant_type.startswith("fp8") and case.device == "cpu":
        raise ConfigError(
            f"--quant_type {model.quant_type} and --device {case.config.engine.device} (here a CPU): FP8 "
            "needs a GPU; use --quant_type w8 or w4 on a CPU"
        )
    if model.quant_type in ("w8", "w4") and case.device == "cuda":
        raise ConfigError(
            f"--quant_type {model.quant_type} and --device {case.config.engine.device} (here a GPU): weights "
            "are rounded at load on a CPU only in this version; use --device cpu, or leave --quant_type out"
        )


def _check_cluster(case: _Case) -> None:
    mode, nnodes = case.config.server.run_mode, case.config.parallel.nnodes
    directory = case.given("config_server_host", "config_server_port")
    if len(directory) == 1:
        raise ConfigError(
            f"{directory[0]} alone: a config_server has an address and a port; give both "
            "--config_server_host and --config_server_port"
        )
    if mode == "config_server":
        if not directory:
            raise ConfigError(
                "--run_mode config_server has no address to bind; give --config_server_host and "
                "--config_server_port"
            )
        http = case.given("host", "port")
        if http:
            raise ConfigError(
                f"{' and '.join(http)} with --run_mode config_server: it binds --config_server_host and "
                f"--config_server_port; leave {' and '.join(http)} out"
            )
    elif case.config.config_server.config_server_store != "memory":
        raise ConfigError(
            f"--config_server_store {case.config.config_server.config_server_store} with --run_mode {mode}: "
            "only a config_server keeps a list; leave it out here"
        )
    if mode in ("prefill", "decode"):
        master = case.given("pd_master_ip")
        if bool(master) == bool(directory):
            got = "both ways are given" if master else "none is given"
            raise ConfigError(
                f"--run_mode {mode} needs exactly one way to its master, and {got}: --pd_master_ip with "
                "--pd_master_port, or --config_server_host with --config_server_port"
            )
    node_rank = case.config.parallel.node_rank
    if node_rank and (http := case.given("host", "port")):
        raise ConfigError(
            f"{' and '.join(http)} with --node_rank {node_rank}: only machine 0 serves HTTP in this version; "
            f"leave {' and '.join(http)} out"
        )
    if mode != "normal" and nnodes > 1:
        raise ConfigError(f"--run_mode {mode} with --nnodes {nnodes}: not implemented in this version")


def _check_engine(case: _Case) -> None:
    engine = case.config.engine
    draft_ngram = case.config.parallel.draft_ngram
    if draft_ngram and case.device == "cuda":
        raise ConfigError(
            f"--draft_ngram {draft_ngram} and --device {engine.device} (here a GPU): drafts are verified on "
            "a CPU only in this version; use --device cpu, or leave --draft_ngram out"
        )
    capacity = engine.max_total_token_num
    if capacity and case.given("running_max_req_size") and engine.running_max_req_size > capacity:
        raise ConfigError(
            f"--running_max_req_size {engine.running_max_req_size} and --max_total_token_num {capacity}: a "
            "running request holds at least one token; lower the first or raise the second"
        )
    limit = _max_req_total_len(case)
    if _is_step_judged(case) and engine.batch_max_tokens < limit:
        raise ConfigError(
            f"--batch_max_tokens {engine.batch_max_tokens} and --disable_chunked_prefill: a whole prompt of "
            f"up to --max_req_total_len {limit} tokens must fit into one step; raise the first or lower the "
            "last"
        )


def _is_step_judged(case: _Case) -> bool:
    """Whether whole prompts must fit an explicit step budget, and their limit is known."""
    is_limit_known = case.model_config is not None or "max_req_total_len" in case.explicit
    return (
        case.config.engine.disable_chunked_prefill
        and bool(case.config.engine.batch_max_tokens)
        and is_limit_known
    )


RULES: tuple[Callable[[_Case], None], ...] = (_check_shape, _check_model, _check_cluster, _check_engine)


# ---------------------------------------------------------------- values that `auto` stands for


def _max_req_total_len(case: _Case) -> int:
    limits = [case.config.engine.max_req_total_len, case.config.engine.max_total_token_num]
    if case.model_config is not None:
        limits.append(case.model_config.max_context_len)
    return min(limit for limit in limits if limit is not None)


def _filled_in(case: _Case) -> Config:
    config = case.config
    replace = msgspec.structs.replace
    server, parallel = config.server, config.parallel
    max_req_total_len = _max_req_total_len(case)
    if server.advertise_host is None and server.host not in WILDCARDS:
        server = replace(server, advertise_host=server.host)
    threads = config.environment.omp_num_threads or case.machine.num_physical_cores // (
        parallel.tp // parallel.nnodes
    )
    return replace(
        config,
        model=_model(config),
        server=server,
        engine=_engine(case, max_req_total_len),
        graph=replace(
            config.graph, graph_max_len_in_batch=config.graph.graph_max_len_in_batch or max_req_total_len
        ),
        parallel=replace(parallel, multinode_port=parallel.multinode_port or parallel.nccl_port + 1),
        environment=replace(config.environment, omp_num_threads=max(1, threads)),
    )


def _model(config: Config) -> ModelSection:
    model = config.model
    name = model.model_dir.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    if name in ("", ".", "..", "~"):
        name = "model"
    return msgspec.structs.replace(model, served_model_name=model.served_model_name or (name,))


def _engine(case: _Case, max_req_total_len: int) -> EngineSection:
    engine = case.config.engine
    is_gpu = case.device == "cuda"
    budget = engine.batch_max_tokens or (GPU_STEP_TOKENS if is_gpu else CPU_STEP_TOKENS)
    chunk = engine.chunked_prefill_size or (GPU_CHUNK_TOKENS if is_gpu else CPU_CHUNK_TOKENS)
    if engine.disable_chunked_prefill:
        budget = chunk = max(budget, max_req_total_len)
    return msgspec.structs.replace(
        engine,
        device=case.device,
        max_req_total_len=max_req_total_len,
        running_max_req_size=min(engine.running_max_req_size, engine.max_total_token_num or MAX_INT),
        batch_max_tokens=budget,
        chunked_prefill_size=min(chunk, budget),
    )


# ---------------------------------------------------------------- what has to be said


def _warnings(case: _Case) -> list[str]:
    config, engine = case.config, case.config.engine
    found = []
    graph = case.given(*(spec.name for spec in FLAGS.values() if spec.section == "graph"))
    if graph and case.device == "cpu":
        found.append(f"{', '.join(graph)}: no effect on a CPU, which has no CUDA graphs")
    if engine.device == "auto" and case.machine.num_gpus and case.machine.gpu_obstacle:
        found.append(f"--device auto: a GPU is visible but not used: {case.machine.gpu_obstacle}")
    limit = _max_req_total_len(case)
    if case.given("max_req_total_len") and limit < engine.max_req_total_len:
        source = "--max_total_token_num" if limit == engine.max_total_token_num else "the model's context"
        found.append(f"--max_req_total_len {engine.max_req_total_len}: cut to {limit}, {source}")
    if case.given("chunked_prefill_size") and engine.disable_chunked_prefill:
        found.append("--chunked_prefill_size: no effect with --disable_chunked_prefill")
    elif case.given("chunked_prefill_size") and 0 < engine.batch_max_tokens < engine.chunked_prefill_size:
        found.append(f"--chunked_prefill_size: cut to --batch_max_tokens {engine.batch_max_tokens}")
    if config.environment.kv_trans_use_p2p is not None and case.given("kv_transport"):
        found.append(f"KV_TRANS_USE_P2P: no effect, --kv_transport {config.pd.kv_transport} wins")
    if config.parallel.nnodes > 1 and is_loopback(config.parallel.nccl_host):
        found.append(
            f"--nccl_host {config.parallel.nccl_host} with --nnodes {config.parallel.nnodes}: a loopback "
            "address works only while all ranks share one machine"
        )
    meeting = case.given("nccl_host", "nccl_port", "multinode_port")
    if meeting and config.parallel.nnodes == 1:
        found.append(f"{', '.join(meeting)}: no effect with one machine, whose ranks need no port")
    serves = config.server.run_mode != "config_server"
    if serves and not config.security.api_key and not is_loopback(config.server.host):
        found.append(
            f"--host {config.server.host} without --api_key: everybody who reaches this address can use the "
            "server"
        )
    return found


def _unchecked(case: _Case) -> list[str]:
    config = case.config
    found = []
    if config.engine.device == "auto" and not case.machine.num_gpus:
        found.append("--device auto: no GPU is visible, so nothing about GPUs was checked")
    if config.engine.disable_chunked_prefill and config.engine.batch_max_tokens and not _is_step_judged(case):
        found.append("--batch_max_tokens: the model's context, which it must reach, is not known")
    peers = {"pd_master_ip": config.pd.pd_master_ip}
    if config.server.run_mode != "config_server":
        peers["config_server_host"] = config.config_server.config_server_host
    elif config.config_server.config_server_store != "memory":
        peers["config_server_store"] = config.config_server.config_server_store
    if config.parallel.nnodes > 1:
        peers["nccl_host"] = config.parallel.nccl_host
    found += [f"--{name} {host}: not contacted" for name, host in peers.items() if host]
    return found
