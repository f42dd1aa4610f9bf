"""From a message to a request, or to the reason why not; and why one ends by itself.

Pure functions of a message or request and of limits; ending a request is the scheduler's business.
"""

from lightllm.messages import EngineRequest, RequestFailure
from lightllm.scheduler.request import Request


def refusal(
    message: EngineRequest, *, is_in_use: bool, max_total_len: int, num_waiting: int, max_waiting: int
) -> RequestFailure | None:
    """Why a request cannot be accepted; None if it can. `is_in_use`: there is another one of its id."""
    if is_in_use:
        text = f"request id {message.request_id} is in use already"
        return RequestFailure(code="internal", message=text)
    num_prompt, num_new = len(message.prompt_token_ids), message.sampling_params.max_new_tokens
    if message.grammar:
        text = "constrained output is not implemented in this version"
        return RequestFailure(code="not_supported", message=text)
    if not message.prompt_token_ids:
        return RequestFailure(code="out_of_range", message="the prompt is empty; send at least one token")
    if num_prompt + num_new > max_total_len:
        text = (
            f"prompt has {num_prompt} tokens and max_new_tokens is {num_new}, together "
            f"{num_prompt + num_new}; the limit is {max_total_len}; shorten the prompt or lower "
            "max_new_tokens"
        )
        return RequestFailure(code="context_length_exceeded", message=text)
    if num_waiting >= max_waiting:
        text = (
            f"{num_waiting} requests are waiting already, the limit is {max_waiting}; "
            "try again later or raise --max_queued_requests"
        )
        return RequestFailure(code="queue_full", message=text)
    return _bad_transfer(message)


def make_request(
    message: EngineRequest, now_s: float, *, seed: int, eos_token_ids: frozenset[int]
) -> Request:
    """The record of an accepted request; the model's end tokens count unless it ignores them."""
    params = message.sampling_params
    end_token_ids = frozenset() if params.ignore_eos else eos_token_ids
    if params.stop_token_ids:
        end_token_ids = end_token_ids.union(params.stop_token_ids)
    # A clock that is ahead somewhere else must not push a request to the end of the queue.
    arrival_s = min(message.arrival_s, now_s) if message.arrival_s else now_s
    request = Request(message, arrival_s=arrival_s, seed=seed, end_token_ids=end_token_ids)
    request.note("queued", now_s)
    return request


def _bad_transfer(message: EngineRequest) -> RequestFailure | None:
    if message.send_kv_to is not None and message.recv_kv_from is not None:
        text = "a request both sends its KV and receives it; one leg does one of them"
        return RequestFailure(code="internal", message=text)
    return None


def expiry(request: Request, now_s: float, *, lease_s: float) -> RequestFailure:
    """Why a request ends whose `expiry_s` has come."""
    age_s = now_s - request.arrival_s
    if request.deadline_s <= now_s:
        text = (
            f"the deadline passed {age_s:.1f} s after arrival with {request.num_output_tokens} of at most "
            f"{request.sampling_params.max_new_tokens} tokens made; allow more time or ask for fewer tokens"
        )
        return RequestFailure(code="deadline", message=text)
    if request.lease_until_s <= now_s:
        text = (
            f"nobody renewed the lease of this request in {lease_s:g} s ({age_s:.1f} s after arrival, "
            f"{request.state.name.lower()}): its pd_master is gone, or cut off"
        )
        return RequestFailure(code="lease_expired", message=text)
    text = (
        f"no room for the KV of {len(request.token_ids)} tokens after waiting {age_s:.1f} s; "
        "try another decode node, or later"
    )
    return RequestFailure(code="kv_full", message=text)
