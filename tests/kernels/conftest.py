"""Kernels run on a GPU if there is one, else in Triton's interpreter (tests/conftest.py).

The interpreter has no bfloat16 arithmetic, so that dtype needs the `gpu` marker.
"""

import importlib.util

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
