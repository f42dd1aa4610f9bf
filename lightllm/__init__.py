"""lightllm: an LLM inference server.

Imports nothing heavy, so that `--help` and the torch-free processes stay light.
"""

from lightllm.errors import (
    BindError,
    CapacityError,
    ClusterError,
    ConfigError,
    ContextLengthError,
    DeadlineExceeded,
    EngineError,
    InvalidSamplingParams,
    KVTransferError,
    LightLLMError,
    ModelLoadError,
    RequestError,
    WorkerDied,
)
from lightllm.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "BindError",
    "CapacityError",
    "ClusterError",
    "ConfigError",
    "ContextLengthError",
    "DeadlineExceeded",
    "EngineError",
    "InvalidSamplingParams",
    "KVTransferError",
    "LightLLMError",
    "ModelLoadError",
    "RequestError",
    "SamplingParams",
    "WorkerDied",
    "__version__",
]
