"""Settings of every test process: one compute thread, no network, nothing inherited from the shell.

Runs before torch is imported, because OpenMP reads its variable once, and Triton has to be told to interpret
kernels (on a machine without a GPU) before the first one is seen.
"""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A shell starts background jobs with SIGINT ignored, and children would inherit that; tests send it to them.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
if not list(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"
for name in [name for name in os.environ if name.startswith("LIGHTLLM_") or name == "LOADWORKER"]:
    del os.environ[name]

# A shared or busy machine must not decide whether a test passes, and a failure must come again.
settings.register_profile(
    "lightllm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lightllm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
