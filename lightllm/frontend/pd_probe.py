"""Tries a real transfer between every prefill and every decode node, before and beside the clients' requests.

A pair is ready once two tokens have come through it: one from each side, with KV that moved in between. A
pair that failed is tried again, and gets no requests meanwhile. Runs in the frontend's event loop of a
pd_master; uses the router like any client.
"""

import asyncio
import logging
import random
import time
import uuid
from typing import TYPE_CHECKING, Any

from lightllm.frontend.node_directory import Node
from lightllm.messages import EngineRequest, RequestOutput
from lightllm.packed_ints import pack
from lightllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from lightllm.frontend.pd_router import PDRouter

logger = logging.getLogger(__name__)

PROBE_PROMPT_TOKENS = 8
PROBE_LIMIT_S = 10.0
PROBE_RETRY_S = 5.0

Pair = tuple[str, str]


class PairProbes:
    """What is known of each pair of live nodes."""

    def __init__(self, router: "PDRouter", vocab_size: int) -> None:
        self._router = router
        self._vocab_size = vocab_size
        self._pairs: dict[Pair, _Probe] = {}

    @property
    def is_any_ready(self) -> bool:
        """Whether KV has moved between at least one pair."""
        return any(probe.is_ready for probe in self._pairs.values())

    def failed_with(self, prefill: Node) -> set[str]:
        """Decode nodes that this prefill node could not reach when it was last tried."""
        pairs = self._pairs.items()
        return {decode for (name, decode), probe in pairs if name == prefill.node_id and probe.fault}

    def cut_off(self) -> set[str]:
        """Prefill nodes that reached no decode node when they were last tried."""
        failed = {pair[0] for pair, probe in self._pairs.items() if probe.fault}
        return failed - {pair[0] for pair, probe in self._pairs.items() if not probe.fault}

    def node_joined(self, node: Node) -> None:
        """Try the new node with all of the other role."""
        is_prefill = node.record.role == "prefill"
        for other in self._router.directory.of_role("decode" if is_prefill else "prefill"):
            prefill, decode = (node, other) if is_prefill else (other, node)
            self._pairs[prefill.node_id, decode.node_id] = _Probe(self, prefill, decode)

    def node_lost(self, node: Node) -> None:
        """Forget its pairs."""
        for pair, probe in list(self._pairs.items()):
            if node in (probe.prefill, probe.decode):
                del self._pairs[pair]
                probe.stop()

    def why_none(self) -> str:
        """Why no pair is ready, as a sentence."""
        faults = [f"{p} -> {d}: {probe.fault}" for (p, d), probe in self._pairs.items() if probe.fault]
        return "; ".join(faults) or "the first transfer has not come through yet"

    def as_json(self) -> list[dict[str, Any]]:
        """For `/cluster`."""
        return [
            {"prefill": prefill, "decode": decode, "is_ready": probe.is_ready, "fault": probe.fault}
            for (prefill, decode), probe in self._pairs.items()
        ]

    def start(self, probe: "_Probe") -> None:
        """Send one probe through its pair."""
        prompt = [random.randrange(self._vocab_size) for _ in range(PROBE_PROMPT_TOKENS)]
        request = EngineRequest(
            request_id=f"probe_{uuid.uuid4().hex}",
            prompt_token_ids=pack(prompt),
            sampling_params=SamplingParams(max_new_tokens=2, do_sample=False, ignore_eos=True, seed=0),
            arrival_s=time.time(),
        )
        probe.request_id = request.request_id
        self._router.submit_to(request, probe, probe.prefill, probe.decode)

    def cancel(self, probe: "_Probe") -> None:
        """Stop one that runs."""
        self._router.abort(probe.request_id)


class _Probe:
    """One pair, and the request that tries it."""

    def __init__(self, probes: PairProbes, prefill: Node, decode: Node) -> None:
        self.prefill = prefill
        self.decode = decode
        self.is_ready = False
        self.fault = ""
        self.request_id = ""
        self._probes = probes
        self._num_tokens = 0
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_soon(self._try)

    def stop(self) -> None:
        """Try no more."""
        self._timer.cancel()
        self._probes.cancel(self)

    def on_output(self, output: RequestOutput) -> None:
        """A token, or the end."""
        self._num_tokens += len(output.new_token_ids)
        if output.finish_reason is None:
            return
        if output.error is not None or self._num_tokens != 2:
            self._failed(output.error.message if output.error is not None else "tokens are missing")
            return
        self._timer.cancel()
        self.is_ready, self.fault = True, ""
        logger.info("KV moves from %s to %s", self.prefill.node_id, self.decode.node_id)

    def _try(self) -> None:
        self._num_tokens = 0
        self._timer = self._loop.call_later(PROBE_LIMIT_S, self._is_late)
        self._probes.start(self)

    def _is_late(self) -> None:
        self._probes.cancel(self)
        self._failed(f"no answer within {PROBE_LIMIT_S:.0f} s")

    def _failed(self, fault: str) -> None:
        if fault != self.fault:
            logger.warning("no KV moves from %s to %s: %s", self.prefill.node_id, self.decode.node_id, fault)
        self.fault = fault
        self._timer.cancel()
        self._timer = self._loop.call_later(PROBE_RETRY_S, self._try)
