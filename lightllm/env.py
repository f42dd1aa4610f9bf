"""Every environment variable that lightllm reads, typed and documented, read once while flags are parsed.

L0. Children get a `Config` that holds an `Environment`, and look at no variable themselves. Variables that
only libraries read (HF_*, NCCL_*) are listed for `doctor` and the docs, and passed on untouched.
"""

import os.path
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import msgspec

from lightllm.errors import ConfigError

PREFIX = "LIGHTLLM_"
MAX_LOADWORKER = 256


class Variable(NamedTuple):
    """One row of the documentation."""

    name: str
    default: str
    effect: str


VARIABLES: tuple[Variable, ...] = (
    Variable("LOADWORKER", "min(8, cores)", "threads that read weight files, 1..256"),
    Variable("KV_TRANS_USE_P2P", "unset", "1 or unset: GPU peer-to-peer is tried first; 0: never"),
    Variable("MOE_MODE", "unset", "EP = --moe_mode ep"),
    Variable("CUDA_VISIBLE_DEVICES", "all", "GPUs of this node; ranks index this list"),
    Variable("LIGHTLLM_<FLAG>", "-", "any flag, upper case; booleans 1/0; the command line wins"),
    Variable("LIGHTLLM_HOME", "~/.lightllm", "token file and caches"),
    Variable("OMP_NUM_THREADS", "physical cores / local processes", "compute threads of each process"),
    Variable("HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE", "the library's", "hub downloads"),
    Variable("NCCL_*, GLOO_*", "the libraries', but NCCL_NVLS_ENABLE=0", "passed on"),
    Variable("UCX_*, NIXL_*", "the libraries', but quieter", "passed on to --kv_transport nixl"),
    Variable("CUDA_MPS_PIPE_DIRECTORY", "the driver's", "where the CUDA MPS daemon listens"),
)


class Environment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the environment says apart from flags.

    `kv_trans_use_p2p` and `cuda_visible_devices` are None where the variable is unset. `omp_num_threads` is 0
    until `resolve` has replaced an unset one.
    """

    loadworker: int = 8
    kv_trans_use_p2p: bool | None = None
    moe_mode: str | None = None
    cuda_visible_devices: str | None = None
    home: str = "~/.lightllm"
    omp_num_threads: int = 0


def read_environment(environ: Mapping[str, str], *, num_cores: int) -> Environment:
    """Read the variables that are no flags.

    Args:
        environ: `os.environ`, or any mapping in tests.
        num_cores: logical cores that this process may use; bounds the default of LOADWORKER.

    Raises:
        ConfigError: a variable has a value outside its range.
    """
    return Environment(
        loadworker=_integer(environ, "LOADWORKER", min(8, num_cores), MAX_LOADWORKER),
        kv_trans_use_p2p=_switch(environ, "KV_TRANS_USE_P2P"),
        moe_mode=_moe_mode(environ),
        cuda_visible_devices=environ.get("CUDA_VISIBLE_DEVICES"),
        home=os.path.expanduser(environ.get("LIGHTLLM_HOME") or "~/.lightllm"),
        omp_num_threads=_omp_num_threads(environ),
    )


class FlagVariables(NamedTuple):
    """Flags that the environment sets: variable name -> text, and what was left aside."""

    texts: dict[str, str]
    warnings: list[str]


def read_flag_variables(environ: Mapping[str, str], names: Collection[str]) -> FlagVariables:
    """Pick the `LIGHTLLM_<FLAG>` variables.

    Empty variables count as unset. Values that start with `tcp://` are Kubernetes service links, never meant
    for us.

    Args:
        environ: `os.environ`, or any mapping in tests.
        names: flag names and aliases, lower case.
    """
    ours = {key: text for key, text in sorted(environ.items()) if key.startswith(PREFIX) and text}
    ours.pop("LIGHTLLM_HOME", None)
    links = [key for key, text in ours.items() if text.startswith("tcp://")]
    rest = {key: text for key, text in ours.items() if key not in links}
    known = {key: text for key, text in rest.items() if key[len(PREFIX) :].lower() in names}
    unknown = [key for key in rest if key not in known]
    warnings = []
    if links:
        warnings.append(
            f"{', '.join(links)}: ignored, the value looks like a Kubernetes service link (tcp://...); "
            "set enableServiceLinks: false"
        )
    if unknown:
        warnings.append(
            f"{', '.join(unknown)}: no such setting, ignored; LIGHTLLM_<FLAG> sets a flag of --help"
        )
    return FlagVariables(known, warnings)


def _integer(environ: Mapping[str, str], name: str, default: int, high: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= high:
        raise ConfigError(
            f"{name}: got {text!r}, allowed an integer in 1..{high}; correct or unset the variable"
        )
    return int(text)


def _switch(environ: Mapping[str, str], name: str) -> bool | None:
    text = environ.get(name, "")
    if text not in ("", "0", "1"):
        raise ConfigError(f"{name}: got {text!r}, allowed 1 or 0; correct or unset the variable")
    return None if not text else text == "1"


def _moe_mode(environ: Mapping[str, str]) -> str | None:
    text = environ.get("MOE_MODE", "")
    if text.lower() not in ("", "tp", "ep"):
        raise ConfigError(f"MOE_MODE: got {text!r}, allowed TP or EP; correct or unset the variable")
    return text.lower() or None


def _omp_num_threads(environ: Mapping[str, str]) -> int:
    """Read the first item: OpenMP allows a list, one number per nesting level, and we never nest."""
    first = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return _integer({"OMP_NUM_THREADS": first}, "OMP_NUM_THREADS", 0, 4096)
