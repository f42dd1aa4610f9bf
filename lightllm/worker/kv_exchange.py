"""ExchangingRunner: a runner whose batches also carry orders for the KV transport.

Keeps the order that makes slots safe: KV may land, or leave, only once all steps are computed that were
scheduled before, because these may still use the same slots. Runs in the worker's thread.
"""

import msgspec

from lightllm.messages import ScheduledBatch
from lightllm.transfer.base import Transport
from lightllm.worker.model_runner import LaunchedStep, Runner


class ExchangingRunner(Runner):
    """Runs batches by `runner` and hands their orders to `transport`.

    Both must see memory alike when `launch` of the runner returns, as they do on a CPU.
    """

    def __init__(self, runner: Runner, transport: Transport) -> None:
        self._runner = runner
        self._transport = transport

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Compute one step between the orders that it must come behind and those that come behind it."""
        for request_id in batch.kv_cancels:
            self._transport.cancel(request_id)
        for order in batch.kv_recvs:
            self._transport.receive(order)
        step = self._runner.launch(batch)
        if batch.kv_sends:
            output = step.result()
            step = LaunchedStep(lambda: output)
            for order in batch.kv_sends:
                first_token_id = None
                if order.token_ids:
                    (first_token_id,) = output.token_ids[batch.rows.index(order.row)]
                self._transport.send(order, first_token_id)
        endings = self._transport.poll()
        if not any(endings):
            return step
        return LaunchedStep(
            lambda: msgspec.structs.replace(
                step.result(), kv_received=endings.received, kv_sent=endings.sent, kv_failed=endings.failed
            )
        )
