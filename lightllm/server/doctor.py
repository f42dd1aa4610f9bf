"""`lightllm doctor`: what on this machine, in the model folder or on the network would stop a server.

Every check is a function from a `Case` to findings, one line each with its remedy; nothing is changed,
downloaded or loaded. torch is imported in a subprocess only, because a broken one may take its process along.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from lightllm import __version__
from lightllm.cli import parse, wants
from lightllm.config import Config, config_from
from lightllm.env import Environment, read_environment
from lightllm.errors import LightLLMError, ModelLoadError
from lightllm.flag import Arguments
from lightllm.resolution import resolve
from lightllm.server import machine
from lightllm.server.doctor_cluster import check_peers, check_token
from lightllm.server.finding import FAIL, OK, WARN, Case, Check, Finding
from lightllm.server.model_files import (
    describe_files,
    load_tokenizer,
    locate_model,
    looks_like_hub_id,
)

GIB = 1024**3
LEAST_FREE_MEMORY = 2 * GIB
LEAST_SHARED_MEMORY = 256 * 1024**2
TORCH_TIMEOUT_S = 120.0
TORCH_PROBE = (
    "import torch; c = torch.cuda; n = c.device_count() if c.is_available() else 0; "
    "names = [c.get_device_name(i).replace(' ', '_') for i in range(n)]; "
    "print(torch.__version__, torch.version.cuda or '-', *names)"
)
# Where the package runs from a checkout there is no record of what it needs.
# fmt: off
REQUIRED = (
    "torch", "numpy", "msgspec", "pyzmq", "starlette", "uvicorn", "uvloop", "httptools", "tokenizers",
    "safetensors", "jinja2", "prometheus-client", "rich",
)
# fmt: on
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
USAGE = """\
usage: lightllm doctor [FLAGS] [--json]

Checks machine, packages, GPU, model folder, ports and peers for a server with these flags (those of
`lightllm serve`, see its --help). One line each: ok, warn or fail with the remedy. Exit 0, or 1 if one
failed.
"""


class Report(msgspec.Struct):
    """What `--json` prints."""

    ok: bool
    version: str
    checks: list[Finding]


# ---------------------------------------------------------------- flags


def read_flags(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Case, list[Finding]]:
    """The case to check, and what is wrong with the flags; defaults stand in for unusable ones."""
    args, environment, config = Arguments(values={}, spelled={}, warnings=[]), Environment(), Config()
    probed = machine.probe(environ)
    try:
        args = parse(argv, environ)
        environment = read_environment(environ, num_cores=probed.num_cores)
        config = config_from(args.values, environment)
        resolution = resolve(args, environment, probed, None)
    except LightLLMError as error:
        findings = [Finding("flags", FAIL, line) for line in error.message.splitlines()]
    else:
        config = resolution.config
        findings = [Finding("flags", WARN, warning) for warning in resolution.warnings]
        findings = findings or [Finding("flags", OK, f"{len(args.values)} given, all usable")]
    return Case(config, environ, args.spelled), findings


# ---------------------------------------------------------------- machine and packages


def check_machine(case: Case) -> Iterator[Finding]:
    """Cores, instruction sets, memory."""
    arch = platform.machine()
    flags = [flag for flag in CPU_FLAGS if flag in _cpu_flags()]
    cores = f"{machine.logical_cores()} threads on {machine.physical_cores()} cores"
    text = f"{platform.system()} {arch}, {cores}, {' '.join(flags) or 'no vector flags known'}"
    if arch in ("x86_64", "AMD64") and "avx2" not in flags:
        yield Finding("machine", WARN, text, "without AVX2 computing on the CPU is very slow")
    else:
        yield Finding("machine", OK, text)
    free, total = machine.available_memory_bytes(), machine.total_memory_bytes()
    text = f"{free / GIB:.1f} GiB of {total / GIB:.1f} GiB RAM are free"
    is_low = free < LEAST_FREE_MEMORY
    yield Finding("memory", WARN if is_low else OK, text, "end other programs" if is_low else "")


def check_packages(case: Case) -> Iterator[Finding]:
    """Python and the packages that the server imports."""
    yield Finding("python", OK, f"{platform.python_version()}, lightllm {__version__} at {sys.executable}")
    found, wrong = [], []
    for name, bounds in _requirements():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        found.append(f"{name} {version}")
        if not _is_within(version, bounds):
            wrong.append(f"{name} {version} is not {bounds}")
    if wrong:
        yield Finding(
            "packages", FAIL, ", ".join(wrong), f"{sys.executable} -m pip install --upgrade lightllm"
        )
    else:
        yield Finding("packages", OK, ", ".join(found))


def _requirements() -> list[tuple[str, str]]:
    """Name and version bounds of each package, extras left out."""
    try:
        lines = importlib.metadata.requires("lightllm") or []
    except importlib.metadata.PackageNotFoundError:
        return [(name, "") for name in REQUIRED]
    matches = (re.match(r"([\w.-]+)\s*([^;]*)(.*)", line) for line in lines)
    return [(m[1], m[2].strip()) for m in matches if m is not None and "extra ==" not in m[3]]


def _is_within(version: str, bounds: str) -> bool:
    """Whether a version satisfies bounds such as `>=2.11,<2.14`; other operators are taken as satisfied."""
    own = _release(version)
    for bound in filter(None, (part.strip() for part in bounds.split(","))):
        if bound.startswith(">=") and own < _release(bound[2:]):
            return False
        if bound[0] == "<" and bound[1] != "=" and own >= _release(bound[1:]):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\s*(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in match[1].split(".")] if match else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_torch(case: Case) -> Iterator[Finding]:
    """Whether torch can be imported, and what it sees."""
    if case.config.server.run_mode in ("pd_master", "config_server"):
        yield Finding("torch", OK, f"not used by --run_mode {case.config.server.run_mode}")
        return
    command = [sys.executable, "-c", TORCH_PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        yield Finding("torch", FAIL, f"importing it takes more than {TORCH_TIMEOUT_S:g} s", "reinstall torch")
        return
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Finding("torch", FAIL, f"cannot be imported: {reason}", "reinstall torch")
        return
    version, cuda, *devices = done.stdout.split()
    shown = ", ".join(device.replace("_", " ") for device in devices) or "no GPU"
    text = f"{version}, CUDA {cuda}, sees {shown}"
    if not devices and machine.installed_gpus() and case.environ.get("CUDA_VISIBLE_DEVICES") != "":
        yield Finding(
            "torch", WARN, text, "a GPU is installed: use a CUDA build of torch that fits the driver"
        )
    else:
        yield Finding("torch", OK, text)


# ---------------------------------------------------------------- GPU


def check_gpu(case: Case) -> Iterator[Finding]:
    """GPUs, driver, MPS."""
    installed = machine.installed_gpus()
    if not installed:
        # --device cuda is refused with the flags already.
        yield Finding("gpu", OK, "no NVIDIA GPU: the CPU computes")
        return
    visible = machine.visible_gpus(case.environ.get("CUDA_VISIBLE_DEVICES"), installed)
    driver = re.search(r"Kernel Module\S*(?: for \S+)?\s+([\d.]+)", _read("/proc/driver/nvidia/version"))
    if driver is None:
        text = f"{installed} GPUs, but no driver is loaded"
        yield Finding("gpu", FAIL, text, "install or load the NVIDIA driver, or use --device cpu")
    else:
        yield Finding("gpu", OK, f"{visible} of {installed} visible, driver {driver[1]}")
    pipes = Path(case.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps")
    yield Finding("mps", OK, "on" if (pipes / "control").exists() else "off")
    if obstacle := machine.gpu_obstacle():
        yield Finding("gpu", WARN, f"not used: {obstacle}", "or choose --device cpu")


def check_shared_memory(case: Case) -> Iterator[Finding]:
    """Room in /dev/shm, which processes of one node share tensors through."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        yield Finding("shared memory", WARN, f"/dev/shm: {error.strerror}", "mount a tmpfs there")
        return
    is_low = free < LEAST_SHARED_MEMORY
    remedy = "in a container, start it with --shm-size 1g or more" if is_low else ""
    text = f"{free / GIB:.2f} GiB free in /dev/shm"
    yield Finding("shared memory", WARN if is_low else OK, text, remedy)


# ---------------------------------------------------------------- model


def check_model(case: Case) -> Iterator[Finding]:
    """The model's files, its tokenizer, and whether memory can hold its weights."""
    section = case.config.model
    if case.config.server.run_mode == "config_server":
        return
    try:
        files = locate_model(section.model_dir, section.load_format, allow_download=False)
        config = describe_files(files, section.override_config).config
    except LightLLMError as error:
        is_remote = isinstance(error, ModelLoadError) and looks_like_hub_id(section.model_dir)
        if is_remote and not Path(section.model_dir).exists():
            yield Finding("model", WARN, error.message, "the server will try to download it")
        else:
            yield Finding("model", FAIL, error.message)
        return
    size = _weight_bytes(files.path)
    dims = f"{config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size}"
    yield Finding(
        "model", OK, f"{files.path}: {config.architecture}, {dims}, {size / GIB:.2f} GiB of weights"
    )
    memory = machine.total_memory_bytes()
    reads = case.config.server.run_mode != "pd_master" and section.load_format != "dummy"
    if reads and case.config.engine.device == "cpu" and size > memory:
        text = f"{size / GIB:.1f} GiB of weights, {memory / GIB:.1f} GiB of memory"
        yield Finding("model size", FAIL, text, "use a smaller or quantized model")
    try:
        tokenizer = load_tokenizer(case.config)
    except LightLLMError as error:
        yield Finding("tokenizer", FAIL, error.message, "name one with --tokenizer_dir")
        return
    template = "" if tokenizer.has_chat_template else ", no chat template: /v1/chat/completions is refused"
    yield Finding("tokenizer", OK, f"{tokenizer.vocab_size} ids{template}")


def _weight_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


# ---------------------------------------------------------------- address


def check_port(case: Case) -> Iterator[Finding]:
    """Whether the HTTP address can be bound."""
    server, directory = case.config.server, case.config.config_server
    host, port = server.host, server.port
    if server.run_mode == "config_server":
        host, port = directory.config_server_host or host, directory.config_server_port or port
    if not port:
        yield Finding("port", OK, f"any free port of {host}")
    elif machine.is_port_free(host, port):
        yield Finding("port", OK, f"{host}:{port} is free")
    else:
        remedy = "end the program that listens there, or choose another --port (0: a free one)"
        yield Finding("port", FAIL, f"{host}:{port} cannot be bound", remedy)


# ---------------------------------------------------------------- the whole

CHECKS: tuple[Check, ...] = (
    check_machine,
    check_packages,
    check_torch,
    check_gpu,
    check_shared_memory,
    check_model,
    check_port,
    check_token,
    check_peers,
)


def examine(argv: Sequence[str], environ: Mapping[str, str]) -> Iterator[Finding]:
    """All findings, flags first, each as soon as it is known."""
    case, findings = read_flags(argv, environ)
    yield from findings
    for check in CHECKS:
        yield from check(case)


def main(argv: Sequence[str]) -> int:
    """Print the findings; 0 if nothing failed, else 1."""
    if wants(argv, "--help", "-h"):
        print(USAGE, end="")
        return 0
    is_json = wants(argv, "--json")
    flags = [word for word in argv if word != "--json"]
    findings = []
    for finding in examine(flags, os.environ):
        findings.append(finding)
        if not is_json:
            print(finding, flush=True)
    has_failed = any(finding.status == FAIL for finding in findings)
    if is_json:
        report = Report(not has_failed, __version__, findings)
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    return int(has_failed)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _cpu_flags() -> frozenset[str]:
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()
