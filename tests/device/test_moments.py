"""Moments of a GPU: whoever waits, in whatever way, goes on behind the work and not before it."""

import threading

import pytest
import torch

from lightllm.device.base import make_device

pytestmark = pytest.mark.gpu


def busy(device):
    """Begin what takes the GPU some tens of milliseconds."""
    factor = torch.ones(8192, 8192, device=device.torch_device, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for _ in range(64):
        factor @ factor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_urgent", [False, True])
def test_all_threads_that_wait_for_a_moment_go_on_behind_it(is_urgent):
    device = make_device("cuda")
    busy(device)
    moment = device.mark(is_urgent=is_urgent)
    seen = []

    def wait():
        moment.wait()
        seen.append(moment.is_past())

    threads = [threading.Thread(target=wait) for _ in range(16)]
    assert not moment.is_past()
    for thread in threads:
        thread.start()
    assert not seen
    for thread in threads:
        thread.join(10)
    assert seen == [True] * 16
    moment.wait()  # once more, behind it
