"""The engine process: `python -m lightllm.server.engine_main`, started by the supervisor.

Assembles executor, scheduler and loop, reports readiness, and turns the first failure into one readable line.
Imports torch only inside the executor, and with several ranks not at all.
"""

import logging
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightllm.config import Config, decode_config
from lightllm.engine.core import Engine
from lightllm.engine.executor import Executor, InProcessExecutor
from lightllm.engine.link import ZmqLink
from lightllm.engine.process_executor import ProcessExecutor
from lightllm.engine.stats import StatsLog
from lightllm.errors import LightLLMError
from lightllm.logs import setup_logging
from lightllm.messages import ChildConfig, ChildFailed, ChildProgress, ChildReady, EngineInfo, EngineStats
from lightllm.scheduler.config import SchedulerConfig
from lightllm.scheduler.scheduler import Scheduler
from lightllm.server.child import Parent, leave, settle_memory
from lightllm.server.fingerprint import model_fingerprint, tokenizer_fingerprint
from lightllm.server.model_files import ModelDescription, describe_model, open_weights, tokenizer_files
from lightllm.server.other_machine import machine_record

if TYPE_CHECKING:
    from lightllm.worker.worker import Worker

logger = logging.getLogger(__name__)

WARM_UP_PROMPT_TOKENS = 8
EXIT_GRACE_S = 5.0


def main() -> int:
    """Serve until the parent goes or a step fails; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C on the terminal is the supervisor's business
    parent = Parent()
    child = parent.read_config()
    config = decode_config(child.config)
    setup_logging(config.observability.log_format, config.observability.log_level, "engine")
    try:
        return _serve(parent, child, config)
    except LightLLMError as error:
        parent.send(ChildFailed(message=str(error), exit_code=error.exit_code))
        return error.exit_code
    except Exception as error:
        logger.exception("the engine failed")
        parent.send(ChildFailed(message=f"{type(error).__name__}: {error}", exit_code=1))
        return 1


def _serve(parent: Parent, child: ChildConfig, config: Config) -> int:
    stopping, link = threading.Event(), ZmqLink(child.address, child.reply_address)
    parent.watch(lambda message: None, lambda: _stop(stopping, link))
    description, observability = describe_model(config), config.observability
    executor = _make_executor(config, child, description, parent)
    info = executor.info()
    scheduler = Scheduler(scheduler_config(config, info, description.config.eos_token_ids))
    engine = Engine(
        scheduler,
        executor,
        link,
        enable_overlap=not config.engine.disable_overlap,
        on_stats=_ignore
        if observability.disable_log_stats
        else StatsLog(observability.log_stats_interval).note,
    )
    engine.warm_up([0] * min(WARM_UP_PROMPT_TOKENS, info.max_req_total_len - 2))
    settle_memory()
    parent.send(ChildReady(info=info))

    def should_stop() -> bool:
        executor.check()
        return stopping.is_set()

    try:
        engine.run(should_stop)
    finally:
        link.close()
    executor.close()
    return 0


def _make_executor(
    config: Config, child: ChildConfig, description: ModelDescription, parent: Parent
) -> Executor:
    """The worker in a thread of this process, or one process for each of several ranks."""
    if config.parallel.tp == 1:
        return InProcessExecutor(partial(_load_worker, config, description, parent))
    directory = Path(child.address.removeprefix("ipc://")).parent
    record = machine_record(config, description) if config.parallel.nnodes > 1 else {}
    return ProcessExecutor(config, directory, lambda *report: parent.send(_progress(*report)), record)


def _load_worker(config: Config, description: ModelDescription, parent: Parent) -> "Worker":
    parent.send(ChildProgress(stage="importing torch"))
    from lightllm.distributed.parallel_state import Parallel
    from lightllm.worker.worker import Worker  # torch is imported here and nowhere above

    source = open_weights(description)
    worker = Worker.load(config, description.config, source, lambda *report: parent.send(_progress(*report)))
    if config.moves_kv:
        hashes = model_fingerprint(description), tokenizer_fingerprint(tokenizer_files(config))
        worker.open_kv_link(config, description.config, hashes, Parallel())
    return worker


def scheduler_config(config: Config, info: EngineInfo, eos_token_ids: list[int]) -> SchedulerConfig:
    """The scheduler's numbers: from flags, and from what the loaded model and its device allow."""
    max_len = info.max_req_total_len
    is_chunked = not config.engine.disable_chunked_prefill
    batch_max_tokens = config.engine.batch_max_tokens
    return SchedulerConfig(
        num_slots=info.kv_total_tokens,
        max_running=min(config.engine.running_max_req_size, info.kv_total_tokens),
        batch_max_tokens=batch_max_tokens if is_chunked else max(batch_max_tokens, max_len),
        chunked_prefill_size=min(config.engine.chunked_prefill_size, batch_max_tokens),
        max_req_total_len=max_len,
        max_queued_requests=config.server.max_queued_requests,
        schedule_policy=config.engine.schedule_policy,
        eos_token_ids=eos_token_ids,
        enable_prefix_cache=not config.engine.disable_dynamic_prompt_cache,
        enable_chunked_prefill=is_chunked,
        draft_ngram=config.parallel.draft_ngram,
    )


def _ignore(stats: EngineStats) -> None:
    return


def _progress(stage: str, done: int, total: int) -> ChildProgress:
    return ChildProgress(stage=stage, done=done, total=total)


def _stop(stopping: threading.Event, link: ZmqLink) -> None:
    """End the loop after its current turn; a turn that hangs does not keep an orphan alive."""
    stopping.set()
    link.wake()
    time.sleep(EXIT_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    leave(main())
