"""ExchangingRunner: a runner whose batches also carry orders for a KV transport; and how that is opened.

Keeps the order that makes slots safe: KV may land, or leave, only once all steps are computed that were
scheduled before, because these may still use the same slots. On a device that runs behind the calls the
transport waits for that, not the worker's thread, in which this runs.
"""

import logging
from functools import partial

import msgspec

from lightllm.cluster_link import cluster_token
from lightllm.config import Config
from lightllm.device.base import ApproachedMoment, Device, Moment, PastMoment
from lightllm.distributed.shares import kv_head_ranges
from lightllm.errors import ConfigError
from lightllm.messages import EngineInfo, KVLayout, KVTransferOrder, ScheduledBatch, StepOutput
from lightllm.model_config import ModelConfig
from lightllm.transfer import LANES
from lightllm.transfer.base import Limits, NullTransport, Transport
from lightllm.transfer.lane import LaneUnavailable, open_lanes
from lightllm.transfer.link import KVLink
from lightllm.transfer.plan import HostRows, KVRows
from lightllm.transfer.shipment import Node
from lightllm.worker.model_runner import LaunchedStep, Runner

logger = logging.getLogger(__name__)


class ExchangingRunner(Runner):
    """Runs batches by `runner` and hands their orders to `transport`.

    Behind a step that could not be launched nothing is computed or sent until the engine says that it has
    heard of it: what followed would build on KV that is not there, and other nodes would cache it.

    Attributes:
        transport: without one, transfers fail.
    """

    def __init__(self, runner: Runner, device: Device) -> None:
        self.runner = runner
        self.device = device
        self.transport: Transport = NullTransport()
        self._has_failed = False

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Launch one step between the orders that it must come behind and those that come behind it.

        A batch that only asks touches nothing but the transport: any thread may launch it.
        """
        if batch.is_question:
            return LaunchedStep(partial(self._told, StepOutput(step_id=batch.step_id, token_ids=[])))
        if self._has_failed and not batch.is_restart:
            raise RuntimeError("a step before this one has failed")
        self._has_failed = True
        step = self._launch(batch)
        self._has_failed = False
        return step

    def _launch(self, batch: ScheduledBatch) -> LaunchedStep:
        if batch.kv_cancels:
            self.transport.cancel(*batch.kv_cancels)
        if batch.kv_recvs:
            free = self.device.mark()
            for order in batch.kv_recvs:
                self.transport.receive(order, free)
        computed = [order for order in batch.kv_sends if order.is_computed]
        others = [order for order in batch.kv_sends if not order.is_computed]
        before = self.device.mark() if batch.kv_sends else PastMoment()
        self._send(computed, before)
        step = self.runner.launch(batch)
        if others:
            end = step.kv_written or ApproachedMoment(before, self.device.mark(is_urgent=True))
            self._send(others, end)
        return LaunchedStep(partial(self._collect, step, batch))

    def _send(self, orders: list[KVTransferOrder], written: Moment) -> None:
        for order in orders:
            self.transport.send(order, written)

    def _collect(self, step: LaunchedStep, batch: ScheduledBatch) -> StepOutput:
        """Take the result of a step; the KV that led to its tokens may be on its way already."""
        output = step.result()
        for order in batch.kv_sends:
            if order.token_ids:
                (first_token_id,) = output.token_ids[batch.rows.index(order.row)]
                self.transport.complete(order.request_id, first_token_id)
        return self._told(output)

    def _told(self, output: StepOutput) -> StepOutput:
        """That result, with what the transport has to tell."""
        endings = self.transport.poll()
        if not any(endings):
            return output
        return msgspec.structs.replace(
            output,
            kv_received=endings.received,
            kv_sent=endings.sent,
            kv_failed=endings.failed,
            kv_transfers=endings.transfers,
        )


def open_kv_link(
    exchanging: ExchangingRunner,
    info: EngineInfo,
    config: Config,
    model_config: ModelConfig,
    hashes: tuple[str, str],
    rank: int,
    epoch: int,
) -> EngineInfo:
    """Give a runner a KV link, as the flags say.

    Args:
        hashes: of model and tokenizer.
        rank, epoch: of this rank, and of this life of the node: the same number on all ranks.
    Returns:
        The engine's description, with what peers must know of the link.

    Raises:
        ConfigError: the device, the transport or the cluster token cannot be used.
        BindError: the address is taken.
    """
    layout = KVLayout(
        model_hash=hashes[0],
        tokenizer_hash=hashes[1],
        vocab_size=model_config.vocab_size,
        num_layers=model_config.num_hidden_layers,
        num_kv_heads=model_config.num_key_value_heads,
        head_dim=model_config.head_dim,
        dtype=info.dtype,
        kv_dtype=info.dtype,
        tp_size=config.parallel.tp,
        quantization=config.model.quant_type,
    )
    chosen = config.pd.kv_transport
    names, reason = _lane_names(config)
    heads = kv_head_ranges(model_config, config.parallel.tp)
    try:
        lanes = open_lanes(names, _rows_of(exchanging, heads[rank].start))
    except LaneUnavailable as error:
        raise ConfigError(f"--kv_transport {chosen} cannot be used here: {error}") from error
    node = Node(
        layout=layout,
        token=cluster_token(config.security.cluster_token, config.environment.home),
        epoch=epoch,
        lanes=lanes,
        limits=Limits(),
        head_ranges=partial(kv_head_ranges, model_config),
        rank=rank,
    )
    port = config.pd.kv_port + rank if config.pd.kv_port else 0
    link = KVLink(node, config.server.host, port, config.server.advertise_host)
    logger.info("KV link at %s, by %s (%s)", link.address, " or ".join(lanes.names), reason)
    exchanging.transport = link
    return msgspec.structs.replace(info, kv_address=link.address, kv_layout=layout, kv_epoch=node.epoch)


def _lane_names(config: Config) -> tuple[list[str], str]:
    """The lanes to open, in their order, and why these."""
    chosen = config.pd.kv_transport
    if chosen != "auto":
        return [chosen], f"--kv_transport {chosen}"
    if config.environment.kv_trans_use_p2p is False:
        return [name for name in LANES if name != "p2p"], "--kv_transport auto, KV_TRANS_USE_P2P=0"
    return list(LANES), "--kv_transport auto"


def _rows_of(exchanging: ExchangingRunner, first_head: int) -> KVRows:
    pool, device = exchanging.runner.kv_pool, exchanging.device
    if not device.is_async:
        return HostRows(pool, first_head)
    from lightllm.transfer.device_rows import DeviceRows  # needs triton, which a CPU does not

    return DeviceRows(pool, device, first_head)
