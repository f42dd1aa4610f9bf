"""SchedulerConfig: the scheduler's limits and switches. Runs in the engine process."""

import msgspec

from lightllm.errors import ConfigError
from lightllm.scheduler.policy import POLICIES


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and switches.

    Attributes:
        num_slots: KV capacity in tokens (slots 1..num_slots).
        max_running: rows of the worker's tables, that is, requests that run at the same time.
        batch_max_tokens: tokens computed in one step, over all requests.
        chunked_prefill_size: tokens of one request computed in one step.
        max_req_total_len: prompt + output of one request.
        max_queued_requests: how many may wait beyond those for which rows are free.
        eos_token_ids: the model's end tokens.
        draft_ngram: most tokens that are drafted in one step of a single stream; 0 is off.
        enable_chunked_prefill: off, a prompt is computed in one step or waits.
        kv_lease_s: a request that sends or receives KV ends when it is not renewed for so long.
        kv_admission_s: how long a request that receives KV may wait for its slots.
    """

    num_slots: int
    max_running: int
    batch_max_tokens: int
    chunked_prefill_size: int
    max_req_total_len: int
    max_queued_requests: int = 1024
    schedule_policy: str = "fcfs"
    eos_token_ids: list[int] = []
    enable_prefix_cache: bool = True
    enable_chunked_prefill: bool = True
    draft_ngram: int = 0
    kv_lease_s: float = 30.0
    kv_admission_s: float = 5.0

    @property
    def max_total_len(self) -> int:
        """Prompt + output of the longest request that fits."""
        return min(self.max_req_total_len, self.num_slots)

    @property
    def max_chunk(self) -> int:
        """Tokens of one request that a step may take."""
        return self.chunked_prefill_size if self.enable_chunked_prefill else self.batch_max_tokens

    @property
    def max_rows(self) -> int:
        """Rows that are used: each running request can compute at least one token in every step."""
        return min(self.max_running, self.batch_max_tokens)


def check_config(config: SchedulerConfig) -> None:
    """Refuse what could leave a request waiting for ever.

    Raises:
        ConfigError: names the field, its value and what is needed.
    """
    for name in ("num_slots", "max_running", "batch_max_tokens", "chunked_prefill_size", "max_req_total_len"):
        value = getattr(config, name)
        if value < 1:
            raise ConfigError(f"{name}: got {value}, at least 1 is needed")
    if config.schedule_policy not in POLICIES:
        raise ConfigError(f"schedule_policy: got {config.schedule_policy}, allowed {', '.join(POLICIES)}")
    longest = config.max_total_len
    if not config.enable_chunked_prefill and config.batch_max_tokens < longest:
        raise ConfigError(
            f"--batch_max_tokens {config.batch_max_tokens} with --disable_chunked_prefill: a request of "
            f"{longest} tokens would wait for ever; raise it to --max_req_total_len"
        )
