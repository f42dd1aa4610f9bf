"""What prefill/decode disaggregation gives on two GPUs of one machine, beside the same GPUs unsplit.

    python benchmarks/pd_cluster.py --out pd.json --logs FOLDER [--model_dir FOLDER] [--tp N]
    python benchmarks/pd_cluster.py --device cpu --out pd.json --logs FOLDER        # a tiny model, a minute

First the ways between the GPUs alone. Then a cluster as in the quickstart (pd_master, a prefill node on GPU
0, a decode node on GPU 1, KV_TRANS_USE_P2P=1), then two single nodes on the same GPUs, of which the first
alone is what TTFT, texts and ITL are held against; requests of the open loop go to both in turn. Prompts are
random token ids; the model has random weights in the shape of Qwen2-7B unless --model_dir says otherwise.

Each part stands for itself: one that fails is in the table and the JSON with its error, and the others go on.
The JSON is written after every part. Exit code 0 if all parts came through, else 1.
"""

import argparse
import asyncio
import dataclasses
import gc
import json
import logging
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from machine import describe_run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pd_parts
import uvloop
from pd_link import measure_link
from pd_parts import CPU_SIZES, Bench, Entry, Sizes
from pd_servers import Server, stop_all
from pd_table import table

logger = logging.getLogger("pd_cluster")

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    },
}
COMMON: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
# Nothing here reads text.
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
PREFILL_FLAGS = "--running_max_req_size 128 --disable_cudagraph"
PARTS = ("link", "texts", "ttft", "transfer", "itl", "goodput")
CLUSTERS = ("pd", "unsplit")
START_LIMIT_S, READY_LIMIT_S = 150.0, 60.0
PART_LIMIT_S = 100.0


# ------------------------------------------------------------ flags


def parse() -> tuple[argparse.Namespace, Sizes]:
    """Flags; each size is one, too, and its default depends on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file, written after every part")
    parser.add_argument("--logs", type=Path, default=Path("pd_cluster_logs"), help="folder of servers' logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model_dir", type=Path, help="default: --shape")
    parser.add_argument(
        "--load_format", default="dummy", help="of --model_dir; dummy: only its config is read"
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), help="default: qwen2-7b, on a CPU tiny")
    parser.add_argument("--tp", type=int, default=1, help="GPUs of each node: 0..N-1 and N..2N-1")
    parser.add_argument(
        "--prefill_flags",
        default=PREFILL_FLAGS,
        help="the quickstart's; without --disable_cudagraph short prompts have graphs, as on a single node",
    )
    parser.add_argument("--decode_flags", default="", help="--decode_flags='--a 1 --b'")
    parser.add_argument("--single_flags", default="", help="of the two single nodes")
    parser.add_argument(
        "--one_gpu",
        action="store_true",
        help="both nodes of the cluster on GPU 0 (with CUDA's MPS if its daemon runs); each then wants "
        "--mem_fraction in its flags",
    )
    parser.add_argument("--clusters", default=",".join(CLUSTERS))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument(
        "--limit_s", type=float, default=420.0, help="no part is begun behind so many seconds"
    )
    for field in dataclasses.fields(Sizes):
        shown = f"[{getattr(Sizes(), field.name)}; on a CPU {getattr(CPU_SIZES, field.name)}]"
        parser.add_argument(f"--{field.name}", help=shown)
    args = parser.parse_args()
    sizes = CPU_SIZES if args.device == "cpu" else Sizes()
    given = {
        field.name: _parsed(getattr(args, field.name), getattr(sizes, field.name))
        for field in dataclasses.fields(Sizes)
        if getattr(args, field.name) is not None
    }
    args.clusters, args.parts = args.clusters.split(","), args.parts.split(",")
    if not set(args.clusters) <= set(CLUSTERS) or not set(args.parts) <= set(PARTS):
        parser.error(f"clusters are {', '.join(CLUSTERS)}; parts {', '.join(PARTS)}")
    args.shape = args.shape or ("tiny" if args.device == "cpu" else "qwen2-7b")
    return args, dataclasses.replace(sizes, **given)


def _parsed(text: str, default: Any) -> Any:
    """A flag's value, of the type of its default; several are parted by commas."""
    if isinstance(default, tuple):
        return tuple(type(default[0])(part) for part in text.split(","))
    return type(default)(text)


# ------------------------------------------------------------ the report


class Report:
    """All results, printed as they come and kept in a file.

    Args:
        limit_s: parts that would begin later are left out.
    """

    def __init__(self, head: dict[str, Any], out: Path | None, limit_s: float) -> None:
        self.data: dict[str, Any] = {**head, "results": {}}
        self.num_failed = 0
        self._out, self._limit_s = out, limit_s
        self._began_s = time.monotonic()

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"{time.monotonic() - self._began_s:6.1f} s  {text}", file=sys.stderr, flush=True)

    async def part(self, cluster: str, name: str, work: Callable[[Entry], Awaitable[None]]) -> bool:
        """Run one part; what it puts into the entry is kept whatever becomes of it."""
        entry: Entry = {}
        self.data["results"].setdefault(cluster, {})[name] = entry
        began_s = time.monotonic()
        self.say(f"{cluster}: {name}")
        try:
            if began_s - self._began_s > self._limit_s:
                raise TimeoutError(f"left out: {self._limit_s:g} s are over")
            async with asyncio.timeout(PART_LIMIT_S + START_LIMIT_S * (name == "start")):
                await work(entry)
        except Exception as error:
            logger.exception("%s: %s", cluster, name)
            entry["error"] = f"{type(error).__name__}: {error}"[:3000]
            self.num_failed += 1
            self.say(f"{cluster}: {name} FAILED: {entry['error'][:300]}")
        entry["took_s"] = round(time.monotonic() - began_s, 2)
        self.write()
        return "error" not in entry

    def write(self) -> None:
        """Keep what there is."""
        self.data["total_s"] = round(time.monotonic() - self._began_s, 1)
        if self._out is not None:
            self._out.write_text(json.dumps(self.data, indent=1) + "\n", "utf-8")


def describe(args: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """Command, machine, flags; without the folders of this machine."""
    head = describe_run()
    for path in (args.model_dir, args.logs, args.out):
        if path is not None and path.is_absolute():
            head["command"] = head["command"].replace(str(path), path.name)
    head["command"] = head["command"].replace(sys.argv[0], "benchmarks/pd_cluster.py")
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpus = subprocess.run(command, capture_output=True, text=True, check=False) if _has_smi() else None
    return {
        **head,
        "gpus": gpus.stdout.strip().splitlines() if gpus is not None else [],
        "model": args.model_dir.name if args.model_dir else args.shape,
        "load_format": args.load_format,
        "tp": args.tp,
        "sizes": dataclasses.asdict(sizes),
    }


def _has_smi() -> bool:
    return shutil.which("nvidia-smi") is not None


# ------------------------------------------------------------ clusters


class Cluster:
    """Servers that run at the same time. `stop` in every case.

    Args:
        model: flags that name it.
    """

    def __init__(self, args: argparse.Namespace, sizes: Sizes, model: list[str]) -> None:
        self.servers: list[Server] = []
        self._args, self._sizes, self._model = args, sizes, model
        self._env = {"LIGHTLLM_CLUSTER_TOKEN": secrets.token_hex(16)}

    async def start_pd(self, entry: Entry) -> None:
        """pd_master, prefill node, decode node; until KV has moved between the two."""
        limit = ("--max_req_total_len", str(self._sizes.max_req_total_len))
        master = self._launch("pd_master", ["--run_mode", "pd_master", *limit, *self._model], {})
        await master.wait_ready(READY_LIMIT_S)
        port = master.url.rpartition(":")[2]
        where = ["--pd_master_ip", "127.0.0.1", "--pd_master_port", port]
        flags = {"prefill": self._args.prefill_flags, "decode": self._args.decode_flags}
        for index, (role, more) in enumerate(flags.items()):
            self._node(role, index, ["--run_mode", role, *where, *shlex.split(more)])
        await self._wait_nodes(entry, self.servers[1:])
        await master.wait_answers("/readiness", READY_LIMIT_S)

    async def start_unsplit(self, entry: Entry) -> None:
        """Two single nodes."""
        for index in range(2):
            self._node(f"single_{index}", index, shlex.split(self._args.single_flags))
        await self._wait_nodes(entry, self.servers)

    async def _wait_nodes(self, entry: Entry, nodes: list[Server]) -> None:
        await asyncio.gather(*(node.wait_ready(START_LIMIT_S) for node in nodes))
        entry["ready_s"] = {node.name: node.ready_s for node in nodes}
        entry["kv_tokens"] = {node.name: _word(node.ready_line, "kv_tokens") for node in nodes}
        entry["flags"] = {node.name: self._shown(node.flags) for node in nodes}

    def _node(self, name: str, index: int, flags: list[str]) -> Server:
        """One with GPUs; `index` says which."""
        args, sizes = self._args, self._sizes
        size = ["--max_req_total_len", str(sizes.max_req_total_len)]
        size += ["--max_total_token_num", str(sizes.kv_tokens)] if sizes.kv_tokens else []
        ports = ["--nccl_port", str(_two_free_ports())]
        shared = ["--device", args.device, "--tp", str(args.tp), "--drain_timeout", "3", *ports, *size]
        env = {"KV_TRANS_USE_P2P": "1"}
        if args.device == "cuda":
            first = 0 if args.one_gpu else index * args.tp
            gpus = range(first, first + args.tp)
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        else:
            env["OMP_NUM_THREADS"] = "1"
        return self._launch(name, [*self._model, *shared, *flags], env)

    def _launch(self, name: str, flags: list[str], env: dict[str, str]) -> Server:
        server = Server(name, flags, {**self._env, **env}, self._args.logs)
        self.servers.append(server)
        return server

    def _shown(self, flags: list[str]) -> str:
        folder = self._model[1]
        return shlex.join(Path(flag).name if flag == folder else flag for flag in flags)

    def stop(self) -> None:
        """End all, whatever state they are in."""
        stop_all(self.servers)


def _word(line: str, name: str) -> str:
    """A value of the ready line."""
    return next((word.partition("=")[2] for word in line.split() if word.startswith(f"{name}=")), "")


def _two_free_ports() -> int:
    """The lower one of two neighbours that nobody has at the moment."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def prepare_model(args: argparse.Namespace, folder: Path) -> tuple[list[str], int]:
    """Flags that name the model, and its vocabulary; one of random weights is described in that folder."""
    flags = ["--load_format", args.load_format]
    if args.model_dir is not None and args.load_format != "dummy":
        config = json.loads((args.model_dir / "config.json").read_text("utf-8"))
        return ["--model_dir", str(args.model_dir), *flags], int(config["vocab_size"])
    name = args.model_dir.resolve().name if args.model_dir else args.shape
    target = folder / name
    target.mkdir()
    if args.model_dir:
        config = json.loads((args.model_dir / "config.json").read_text("utf-8"))
    else:
        config = {**COMMON, **SHAPES[args.shape]}
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    (target / "tokenizer.json").write_text(json.dumps(TOKENIZER), "utf-8")
    return ["--model_dir", str(target), *flags], int(config["vocab_size"])


# ------------------------------------------------------------ the run


async def run(args: argparse.Namespace, sizes: Sizes, report: Report, folder: Path) -> None:
    """All parts that are asked for, in their order."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _own_task().cancel)
    model, vocab_size = prepare_model(args, folder)
    if "link" in args.parts:
        log = args.logs / "link.log"
        await report.part("gpus", "link", partial(measure_link, args.device, args.tp, sizes, log))
    for name in args.clusters:
        cluster = Cluster(args, sizes, model)
        try:
            start = cluster.start_pd if name == "pd" else cluster.start_unsplit
            if not await report.part(name, "start", start):
                continue
            entries = cluster.servers[:1] if name == "pd" else cluster.servers
            decode = cluster.servers[2] if name == "pd" else None
            clients = [server.client for server in entries]
            bench = Bench(sizes, vocab_size, clients, decode, report.say)
            await run_parts(name, bench, report, args)
        finally:
            report.say(f"{name}: stop")
            cluster.stop()


async def run_parts(name: str, bench: Bench, report: Report, args: argparse.Namespace) -> None:
    """What is measured on one cluster."""
    is_pd = name == "pd"
    # In the order in which they run; those of a single node use the first of the two.
    works: dict[str, Callable[[Entry], Awaitable[None]]] = {
        "texts": lambda entry: pd_parts.texts(bench, entry),
        "ttft": lambda entry: pd_parts.ttft(bench, entry),
        "transfer": lambda entry: pd_parts.transfer(bench, entry, bench.sizes.link_lane),
        "itl": lambda entry: pd_parts.itl(bench, entry, (1, 2) if is_pd else (1,)),
        "goodput": lambda entry: pd_parts.measure_goodput(bench, entry),
    }
    await report.part(name, "warm_up", lambda entry: pd_parts.warm_up(bench, entry))
    for part, work in works.items():
        if part not in args.parts or (part == "transfer" and not is_pd):
            continue
        await report.part(name, part, work)
        if part == "texts" and not is_pd and "pd" in args.clusters:
            results = report.data["results"]
            pd, single = (results.get(c, {}).get("texts", {}) for c in ("pd", "unsplit"))
            await report.part(
                name,
                "compare",
                lambda entry, pd=pd, single=single: pd_parts.compare_texts(bench, entry, pd, single),
            )


def _own_task() -> "asyncio.Task[None]":
    task = asyncio.current_task()
    assert task is not None, "called inside of the loop"
    return task


def main() -> int:
    """Run, print the table."""
    args, sizes = parse()
    args.logs.mkdir(parents=True, exist_ok=True)
    gc.disable()  # a pause here would look like one of the servers
    report = Report(describe(args, sizes), args.out, args.limit_s)
    try:
        with tempfile.TemporaryDirectory() as folder:
            uvloop.run(run(args, sizes, report, Path(folder)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        report.data["interrupted"] = True
        report.num_failed += 1
    finally:
        report.write()
        print("\n".join(table(report.data)), flush=True)
    return 1 if report.num_failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
