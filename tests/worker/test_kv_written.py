"""When the KV of a step counts as written: behind the last layer, and slept for up to the one before it."""

import pytest

from lightllm.device.base import Moment
from lightllm.worker.model_runner import KVWritten


class Mark(Moment):
    """Says when it is waited for."""

    def __init__(self, number, is_urgent, waits):
        self.seen = number, is_urgent
        self._waits = waits

    def wait(self):
        self._waits.append(self.seen)

    def is_past(self):
        return bool(self._waits)


class CountingDevice:
    """Its marks know how many layers had called for their KV to be written."""

    def __init__(self):
        self.num_written = 0
        self.waits = []

    def mark(self, is_urgent=False):
        return Mark(self.num_written, is_urgent, self.waits)


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_kv_is_written_behind_the_last_layer(num_layers):
    device = CountingDevice()
    written = KVWritten(device, num_layers)
    for layer in range(num_layers):
        assert written.moment is None
        device.num_written += 1
        written.note(layer)
    assert not written.moment.is_past()
    written.moment.wait()
    near = [(num_layers - 1, False)] if num_layers > 1 else []
    assert device.waits == [*near, (num_layers, True)]
