"""The engine process: `python -m lightllm.server.engine_main`, started by the supervisor.

Assembles executor, scheduler and loop, reports readiness, and turns the first failure into one readable line.
Imports torch only inside the executor.
"""

import logging
import os
import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from lightllm.config import Config, decode_config
from lightllm.engine.core import Engine
from lightllm.engine.executor import InProcessExecutor
from lightllm.engine.link import ZmqLink
from lightllm.engine.stats import StatsLog
from lightllm.errors import LightLLMError
from lightllm.logs import setup_logging
from lightllm.messages import ChildConfig, ChildFailed, ChildProgress, ChildReady, EngineInfo, EngineStats
from lightllm.scheduler.config import SchedulerConfig
from lightllm.scheduler.scheduler import Scheduler
from lightllm.server.child import Parent, settle_memory
from lightllm.server.model_files import ModelDescription, describe_model, open_weights

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
    stopping = threading.Event()
    parent.watch(lambda message: None, lambda: _stop(stopping))
    description, observability = describe_model(config), config.observability
    executor = InProcessExecutor(partial(_load_worker, config, description, parent))
    info = executor.info()
    link = ZmqLink(child.address, child.reply_address)
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
    try:
        engine.run(stopping.is_set)
    finally:
        link.close()
    executor.close()
    return 0


def _load_worker(config: Config, description: ModelDescription, parent: Parent) -> "Worker":
    parent.send(ChildProgress(stage="importing torch"))
    from lightllm.worker.worker import Worker  # torch is imported here and nowhere above

    source = open_weights(description)
    return Worker.load(config, description.config, source, lambda *report: parent.send(_progress(*report)))


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


def _stop(stopping: threading.Event) -> None:
    """End the loop after its current turn; a turn that hangs does not keep an orphan alive."""
    stopping.set()
    time.sleep(EXIT_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
