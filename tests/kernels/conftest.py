"""Kernels run on a GPU if there is one, else in Triton's interpreter (tests/conftest.py).

The interpreter has no bfloat16 arithmetic, so that dtype needs the `gpu` marker.
"""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
