"""The configuration: one frozen struct per group of flags, and the one table of all flags made from them.

A flag is a field of a section; its `Flag` metadata holds everything else there is to know about it (help,
range, stage that needs it, other spellings). The parser, `--help`, `--dry_run`, `LIGHTLLM_<FLAG>` variables
and the tests all read `FLAGS`, so there is no second list. L0: plain values; nothing is read from the machine
or from files here (`resolution.resolve` fills in what `auto` stands for, probes live in `server/machine.py`).
Sent to children as JSON.
"""

import types
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from lightllm.env import Environment
from lightllm.flag import Flag, FlagSpec

RUN_MODES = ("normal", "prefill", "decode", "pd_master", "config_server")
MASKED = "***"


class ModelSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Model"""

    model_dir: Annotated[
        str,
        Flag("HF folder, .gguf file or folder with one, or hub id org/name", metavar="PATH|ID"),
    ] = "smollm2-135m"
    load_format: Annotated[
        str,
        Flag(
            "dummy = seeded random weights from the config", choices=("auto", "safetensors", "gguf", "dummy")
        ),
    ] = "auto"
    override_config: Annotated[
        dict[str, Any],
        Flag('JSON object that replaces keys of the model\'s config.json, e.g. {"num_hidden_layers": 2}'),
    ] = {}
    tokenizer_dir: Annotated[
        str | None, Flag("tokenizer from elsewhere; as --model_dir", unset="--model_dir's", metavar="PATH|ID")
    ] = None
    tokenizer_mode: Annotated[
        str,
        Flag("slow = reference implementation; auto = fast, else slow", choices=("fast", "slow", "auto")),
    ] = "fast"
    dtype: Annotated[
        str,
        Flag(
            "compute type; auto = the checkpoint's, float32 where the device lacks it",
            choices=("auto", "float32", "float16", "bfloat16"),
            synonyms=(("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")),
            aliases=("data_type",),
        ),
    ] = "auto"
    quant_type: Annotated[
        str,
        Flag(
            "none = run the checkpoint as stored; w8, w4 = round float weights to 8 or 4 bits at load (CPU)",
            choices=("none", "w8", "w4", "w8a8", "fp8w8a8", "fp8w8a8-b128", "w4a16"),
            choice_stages=tuple((word, "-") for word in ("w8a8", "fp8w8a8", "fp8w8a8-b128", "w4a16")),
        ),
    ] = "none"
    kv_cache_dtype: Annotated[
        str, Flag("type of the KV cache; auto = the compute type", stage="-", choices=("auto", "fp8", "int8"))
    ] = "auto"
    served_model_name: Annotated[
        tuple[str, ...],
        Flag(
            "name that clients may use; the first is shown",
            aliases=("model_name",),
            is_repeatable=True,
            unset="last part of the model path, without .gguf",
            metavar="NAME",
        ),
    ] = ()
    eos_id: Annotated[
        tuple[int, ...], Flag("ids that replace the model's end tokens", is_list=True, unset="from the model")
    ] = ()
    generation_config: Annotated[
        str,
        Flag(
            "auto = the model's generation_config.json supplies sampling defaults", choices=("auto", "none")
        ),
    ] = "auto"
    chat_template: Annotated[
        str | None, Flag("Jinja file, run in a sandbox", kind="path", unset="the model's", metavar="PATH")
    ] = None


class ServerSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Server"""

    run_mode: Annotated[
        str,
        Flag(
            "role of this node", choices=RUN_MODES, choice_stages=tuple((mode, "P") for mode in RUN_MODES[1:])
        ),
    ] = "normal"
    host: Annotated[str, Flag("bind address; for nodes also the advertised one", kind="host")] = "127.0.0.1"
    advertise_host: Annotated[
        str | None, Flag("address that other nodes dial", stage="P", kind="host", unset="--host")
    ] = None
    port: Annotated[int, Flag("HTTP port; 0 = a free one, shown in the ready line", high=65535)] = 8000
    httpserver_workers: Annotated[int, Flag("API processes", stage="A", low=1, high=64)] = 1
    max_request_bytes: Annotated[int, Flag("largest request body (413 above)", low=1)] = 16777216
    strict_fields: Annotated[
        bool, Flag("answer unknown request fields with 400 instead of the X-Ignored-Fields header")
    ] = False
    dry_run: Annotated[
        bool, Flag("print the resolved configuration as JSON and exit; loads and binds nothing")
    ] = False
    max_queued_requests: Annotated[int, Flag("waiting requests before 429; one sample = one request")] = 1024
    request_timeout: Annotated[
        float, Flag("seconds one request may take, queueing included; 0 = no bound", metavar="S")
    ] = 1800.0
    drain_timeout: Annotated[
        float, Flag("seconds that running requests may take to finish after SIGTERM", metavar="S")
    ] = 25.0


class EngineSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Engine and scheduler"""

    device: Annotated[
        str,
        Flag(
            "auto = cuda if a GPU is visible and usable, else cpu",
            choices=("auto", "cuda", "cpu"),
            choice_stages=(("cuda", "G"),),
        ),
    ] = "auto"
    max_total_token_num: Annotated[
        int | None, Flag("KV capacity in tokens", low=1, unset="measured from free memory")
    ] = None
    mem_fraction: Annotated[
        float,
        Flag(
            "share of device memory for weights, KV and workspace (CPU: share of half the free RAM)",
            high=1,
            is_open=True,
        ),
    ] = 0.9
    max_req_total_len: Annotated[
        int, Flag("prompt + output tokens per request; cut to the model's context", low=2)
    ] = 16384
    running_max_req_size: Annotated[int, Flag("requests decoded at the same time", low=1)] = 1000
    batch_max_tokens: Annotated[
        int,
        Flag(
            "tokens computed in one step, prefill and decode together; auto = 4096 on a GPU, 128 on a CPU",
            low=1,
            unset="auto",
        ),
    ] = 0
    chunked_prefill_size: Annotated[
        int,
        Flag("largest piece of one prompt per step; auto = 4096 on a GPU, 128 on a CPU", low=1, unset="auto"),
    ] = 0
    schedule_policy: Annotated[
        str,
        Flag("order of waiting requests of equal priority", choices=("fcfs", "shortest_prefill")),
    ] = "fcfs"
    disable_overlap: Annotated[bool, Flag("take each step's result before the next is submitted")] = False
    restart_policy: Annotated[
        str,
        Flag(
            "on_failure = a dead engine is restarted, 3 times in 60 s, then exit 1",
            choices=("on_failure", "never"),
        ),
    ] = "on_failure"
    disable_chunked_prefill: Annotated[
        bool, Flag("whole prompts only; raises --batch_max_tokens to --max_req_total_len")
    ] = False
    disable_dynamic_prompt_cache: Annotated[bool, Flag("no prefix cache")] = False
    long_truncation_mode: Annotated[
        str,
        Flag(
            "too long prompt: none = 400, head = drop its start, center = drop its middle",
            stage="A",
            choices=("none", "head", "center"),
        ),
    ] = "none"
    attention_backend: Annotated[
        str,
        Flag(
            "auto = the best one that passes a start-up self-check; on a CPU native = C kernels for all "
            "operations, torch = plain torch; on a Hopper GPU flashinfer = its kernels for long prompts: the "
            "first start with this compiles them, which takes minutes, and from then on auto takes them",
            choices=("auto", "native", "torch", "triton", "flashinfer"),
            choice_stages=(("triton", "G"), ("flashinfer", "G")),
        ),
    ] = "auto"
    enable_deterministic: Annotated[
        bool, Flag("same request and seed = same tokens whatever the batch; slower", stage="-")
    ] = False


class GraphSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """CUDA graph (on a CPU: one warning, no effect)"""

    disable_cudagraph: Annotated[bool, Flag("eager decode", stage="G")] = False
    graph_max_batch_size: Annotated[
        int, Flag("decode batches up to this size run from a graph", stage="G", low=1)
    ] = 256
    graph_split_batch_size: Annotated[
        int, Flag("every size up to this one is captured", stage="G", low=1)
    ] = 32
    graph_grow_step_size: Annotated[int, Flag("step between captured sizes above it", stage="G", low=1)] = 16
    graph_max_len_in_batch: Annotated[
        int, Flag("a batch with a longer sequence runs eagerly; 0 = --max_req_total_len", stage="G")
    ] = 0


class ParallelSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parallel"""

    tp: Annotated[int, Flag("GPUs over all machines of this node; on a CPU: processes", stage="T", low=1)] = 1
    nnodes: Annotated[int, Flag("machines of this node", stage="T", low=1)] = 1
    node_rank: Annotated[int, Flag("index of this machine; rank 0 serves HTTP", stage="T")] = 0
    nccl_host: Annotated[str, Flag("address of rank 0", stage="T", kind="host")] = "127.0.0.1"
    nccl_port: Annotated[int, Flag("rendezvous port on --nccl_host", stage="T", low=1, high=65535)] = 28765
    multinode_port: Annotated[
        int, Flag("control link between machines", stage="T", low=1, high=65535, unset="--nccl_port + 1")
    ] = 0
    dp: Annotated[int, Flag("data-parallel attention groups; divides --tp", stage="D", low=1)] = 1
    moe_mode: Annotated[str, Flag("how experts are spread", stage="D", choices=("tp", "ep"))] = "tp"
    mtp_mode: Annotated[
        str, Flag("multi-token prediction; needs --mtp_step", stage="D", choices=("none", "deepseekv3"))
    ] = "none"
    mtp_step: Annotated[
        int | None, Flag("draft tokens per step; needs --mtp_mode", stage="D", low=1, high=16)
    ] = None
    mtp_draft_model_dir: Annotated[
        str | None, Flag("draft model, where the checkpoint carries none", stage="D", metavar="PATH")
    ] = None
    draft_ngram: Annotated[
        int,
        Flag(
            "single streams draft up to this many tokens a step from their own text (CPU); 0 = off", high=64
        ),
    ] = 0


class PDSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PD"""

    pd_master_ip: Annotated[str | None, Flag("the one master of this node", stage="P", kind="host")] = None
    pd_master_port: Annotated[int, Flag("its port", stage="P", low=1, high=65535)] = 1212
    kv_transport: Annotated[
        str,
        Flag(
            "auto = the first that a pair can use of p2p, shm, nixl, tcp",
            stage="P",
            choices=("auto", "shm", "p2p", "nixl", "tcp"),
        ),
    ] = "auto"
    kv_port: Annotated[
        int,
        Flag(
            "listening port of the KV link; 0 = a free one",
            stage="P",
            high=65535,
            aliases=("pd_decode_rpyc_port",),
        ),
    ] = 0


class ConfigServerSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Config server"""

    config_server_store: Annotated[
        str,
        Flag(
            "config_server: where its list is kept: memory, or etcd://HOST:PORT[,HOST:PORT]",
            stage="P",
            kind="store",
            metavar="STORE",
        ),
    ] = "memory"
    config_server_host: Annotated[
        str | None, Flag("config_server: its bind address; others: where to find it", stage="P", kind="host")
    ] = None
    config_server_port: Annotated[int | None, Flag("its port", stage="P", low=1, high=65535)] = None


class OutputSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Constrained output and parsers"""

    output_constraint_mode: Annotated[
        str,
        Flag(
            "library for JSON, regex and grammar; auto = llguidance, none = such fields get 400",
            stage="A",
            choices=("auto", "llguidance", "xgrammar", "none"),
        ),
    ] = "auto"
    tool_call_parser: Annotated[
        str,
        Flag(
            "auto = by chat template, none = tools get 400",
            stage="A",
            choices=("auto", "none", "qwen25", "llama3", "mistral", "deepseek", "qwen3"),
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        Flag(
            "splits thinking into reasoning_content",
            stage="A",
            choices=("auto", "none", "deepseek_r1", "qwen3"),
        ),
    ] = "auto"


class ObservabilitySection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Observability"""

    log_format: Annotated[str, Flag("one event a line on stderr", choices=("text", "json"))] = "text"
    log_level: Annotated[
        str,
        Flag("at info at most one line per request", choices=("debug", "info", "warning", "error")),
    ] = "info"
    log_stats_interval: Annotated[
        float, Flag("seconds between throughput lines while busy", low=0, is_open=True, metavar="S")
    ] = 10.0
    disable_log_stats: Annotated[bool, Flag("no throughput lines")] = False
    otlp_endpoint: Annotated[
        str | None, Flag("traces go to this OpenTelemetry collector", stage="A", kind="url", metavar="URL")
    ] = None
    cors_origins: Annotated[
        tuple[str, ...],
        Flag(
            "origin that a browser page may call from",
            stage="A",
            kind="origin",
            is_repeatable=True,
            metavar="ORIGIN",
        ),
    ] = ()
    debug_ring: Annotated[int, Flag("finished requests kept for /debug/requests", high=1_000_000)] = 1000


class SecuritySection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Security"""

    api_key: Annotated[
        tuple[str, ...],
        Flag(
            "key that clients must send; LIGHTLLM_API_KEY holds a comma list",
            is_repeatable=True,
            is_secret=True,
            metavar="KEY|@FILE",
        ),
    ] = ()
    cluster_token: Annotated[
        str | None,
        Flag(
            "authenticates every node-to-node link",
            stage="T",
            is_secret=True,
            unset="$LIGHTLLM_HOME/cluster_token",
            metavar="TOKEN|@FILE",
        ),
    ] = None

    def __repr__(self) -> str:
        """Show whether secrets are set, never what they are."""
        shown = (f"{name}={MASKED if getattr(self, name) else None}" for name in self.__struct_fields__)
        return f"{type(self).__name__}({', '.join(shown)})"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration of a node; `Config()` has every default, unresolved."""

    model: ModelSection = ModelSection()
    server: ServerSection = ServerSection()
    engine: EngineSection = EngineSection()
    graph: GraphSection = GraphSection()
    parallel: ParallelSection = ParallelSection()
    pd: PDSection = PDSection()
    config_server: ConfigServerSection = ConfigServerSection()
    output: OutputSection = OutputSection()
    observability: ObservabilitySection = ObservabilitySection()
    security: SecuritySection = SecuritySection()
    environment: Environment = Environment()

    @property
    def moves_kv(self) -> bool:
        """Whether the engine of this node has a KV link to those of others."""
        return self.server.run_mode in ("prefill", "decode")

    def flags(self) -> dict[str, Any]:
        """Return flag name -> value in the order of the table, secrets masked: for logs and `--dry_run`."""
        values = {}
        for spec in FLAGS.values():
            value = getattr(getattr(self, spec.section), spec.name)
            if spec.flag.is_secret and value:
                value = MASKED if isinstance(value, str) else [MASKED] * len(value)
            values[spec.name] = value
        return values


def _value_type(annotation: Any) -> tuple[type, Flag]:
    """Take `Annotated[int | None, Flag(...)]` apart."""
    base, flag = typing.get_args(annotation)
    origin = typing.get_origin(base)
    if origin in (types.UnionType, tuple):
        base = typing.get_args(base)[0]
    elif origin is not None:
        base = origin
    return base, flag


def _collect() -> dict[str, FlagSpec]:
    specs = {}
    for section in msgspec.structs.fields(Config):
        if section.type is Environment:
            continue
        for field in msgspec.structs.fields(section.type):
            value_type, flag = _value_type(field.type)
            default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            title = section.type.__doc__ or section.name
            specs[field.name] = FlagSpec(field.name, section.name, title, value_type, default, flag)
    return specs


FLAGS: Mapping[str, FlagSpec] = MappingProxyType(_collect())


def config_from(values: Mapping[str, Any], environment: Environment) -> Config:
    """Build a Config from typed values by flag name; flags left out have their defaults."""
    by_section: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        by_section.setdefault(FLAGS[name].section, {})[name] = value
    sections = {
        field.name: field.type(**by_section.get(field.name, {}))
        for field in msgspec.structs.fields(Config)
        if field.name != "environment"
    }
    return Config(environment=environment, **sections)


def encode_config(config: Config) -> bytes:
    """Write a configuration as JSON for a child process; secrets are in clear, so only pipes may carry it."""
    return msgspec.json.encode(config)


def decode_config(data: bytes) -> Config:
    """Read what `encode_config` wrote.

    Raises:
        msgspec.ValidationError: the bytes come from another version.
    """
    return msgspec.json.decode(data, type=Config)
