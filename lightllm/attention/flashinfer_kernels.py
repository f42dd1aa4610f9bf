"""FlashInfer's attention kernels: whether a model can use them here, and getting them compiled and loaded.

FlashInfer compiles its kernels on the machine that runs them, once for each dtype, size of a head and kind of
layer. The libraries stay in `.cache/flashinfer` of the home folder, or of FLASHINFER_WORKSPACE_BASE. Knows no
batch. Runs in the worker, at start; flashinfer is imported only if nothing else speaks against it.
"""

import importlib.util
import logging

import torch

from lightllm.device.cuda import compute_capability
from lightllm.model_config import ModelConfig

logger = logging.getLogger(__name__)

# "fa3" are the kernels written for Hopper's matrix and copy units, and the ones measured against Triton's.
KERNELS = "fa3"
HOPPER = (9, 0)
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
ERROR_CHARACTERS = 400


def load_kernels(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, *, may_compile: bool
) -> str | None:
    """Load the kernels for all kinds of layers of a model, so that no step has to.

    Args:
        may_compile: where they are not compiled yet, do that: it takes minutes.

    Returns:
        None, or in words why they cannot be used; what the operator can do about it is said there, too.
    """
    if problem := _mismatch(config.head_dim, dtype, compute_capability(device)):
        return problem
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed (extra `flashinfer`)"
    try:
        return _load(config, dtype, may_compile)
    except (ImportError, OSError, RuntimeError) as error:
        return f"flashinfer: {str(error).strip()[-ERROR_CHARACTERS:]}"  # a compiler ends with what matters


def _mismatch(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    if capability != HOPPER:
        return f"flashinfer: its kernels are for compute capability 9.0, this card has {_dotted(capability)}"
    if dtype not in DTYPES or head_dim not in HEAD_DIMS:
        return (
            f"flashinfer: computes float16 and bfloat16 with heads of 64, 128 or 256; this model has {dtype} "
            f"and {head_dim}"
        )
    return None


def _load(config: ModelConfig, dtype: torch.dtype, may_compile: bool) -> str | None:
    from flashinfer.jit import gen_batch_prefill_module
    from flashinfer.prefill import get_batch_prefill_module

    variants = _variants(config, dtype)
    specs = [gen_batch_prefill_module(KERNELS, *variant) for variant in variants]
    missing = [spec for spec in specs if not spec.is_compiled]
    if missing and not may_compile:
        return (
            "flashinfer: its kernels for this model are not compiled; start once with --attention_backend "
            "flashinfer, which takes minutes"
        )
    folder = specs[0].build_dir.parent
    if missing:
        logger.info("compiling FlashInfer's kernels, once for this model; takes minutes; into %s", folder)
    else:
        # It has ninja look at each library, which makes those anew whose compiler or headers have changed.
        logger.info("loading FlashInfer's kernels from %s; any older than the toolkit are compiled", folder)
    for variant in variants:
        get_batch_prefill_module(KERNELS, *variant)  # FlashInfer keeps the library for its plans
    return None


def _variants(config: ModelConfig, dtype: torch.dtype) -> list[tuple[object, ...]]:
    """What FlashInfer makes a library of, in the order of its arguments, for each kind of layer."""
    has_window = sorted({config.window(i) is not None for i in range(config.num_hidden_layers)})
    has_softcap = config.attn_logit_softcapping is not None
    head_dim, no_rotary, half_precision_scores = config.head_dim, 0, False
    types = (dtype, dtype, dtype, torch.int32)  # of queries, keys and values, the result, slots
    return [
        (*types, head_dim, head_dim, no_rotary, is_sliding, has_softcap, half_precision_scores)
        for is_sliding in has_window
    ]


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
