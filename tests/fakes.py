"""Stand-ins for the parts that a test is not about: a byte tokenizer, shapes, an engine with one answer."""

import asyncio
from collections.abc import Sequence

import tokenizers

from lightllm.errors import CapacityError
from lightllm.frontend import gguf_vocab
from lightllm.frontend.engine_client import OutputSink
from lightllm.frontend.tokenizer import Tokenizer
from lightllm.messages import (
    EngineInfo,
    EngineRequest,
    EngineStats,
    RequestFailure,
    RequestOutput,
    TokenLogprobs,
)
from lightllm.model_config import ModelConfig

EOS = 256
SMOLLM2 = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = TEMPLATE) -> Tokenizer:
    """Ids 0..255 are bytes, 256 is the end token `<eos>`."""
    vocab = {char: byte for byte, char in enumerate(gguf_vocab.byte_characters())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("<eos>", special=True)])
    return Tokenizer(backend, eos_token_ids=[EOS], chat_template=chat_template)


class FakeEngineClient:
    """Answers every request with the ids of `reply`, one per turn of the event loop, then the end token.

    Attributes:
        failures: errors to answer with instead, after `fail_after` tokens, one per request.
        resumed: outputs wait while this event is clear.
        pauses: seconds to wait before the token of an index.
        aborted: (request_id, reason) in order.
    """

    def __init__(self, reply: str | Sequence[int] = "hello", info: EngineInfo | None = None) -> None:
        self.reply = list(reply.encode()) if isinstance(reply, str) else list(reply)
        self.info = info or EngineInfo(
            device="cpu",
            dtype="float32",
            kv_total_tokens=4096,
            max_req_total_len=256,
            vocab_size=257,
            load_s=0.1,
            attention_backend="fake",
        )
        self.stats = EngineStats(kv_total_tokens=4096)
        self.restarts_total = 0
        self.fault: str | None = None
        self.failures: list[RequestFailure] = []
        self.fail_after = 0
        self.requests: list[EngineRequest] = []
        self.aborted: list[tuple[str, str]] = []
        self.resumed = asyncio.Event()
        self.resumed.set()
        self.pauses: dict[int, float] = {}
        self._live: dict[str, asyncio.Task[None]] = {}

    @property
    def num_live(self) -> int:
        return len(self._live)

    def require_up(self) -> None:
        if self.info is None:
            raise CapacityError("the model is loading", code="loading", retry_after_s=5)

    def submit(self, request: EngineRequest, sink: OutputSink) -> None:
        self.require_up()
        self.requests.append(request)
        self._live[request.request_id] = asyncio.get_running_loop().create_task(self._run(request, sink))

    def abort(self, request_id: str, reason: str = "abort") -> None:
        task = self._live.pop(request_id, None)
        if task is not None:
            self.aborted.append((request_id, reason))
            task.cancel()

    def retry_after_s(self) -> int:
        return 7

    async def refresh(self, limit_s: float) -> None:
        return

    async def find_fault(self) -> str | None:
        return self.fault

    async def _run(self, request: EngineRequest, sink: OutputSink) -> None:
        failure = self.failures.pop(0) if self.failures else None
        params = request.sampling_params
        ids = self.reply[: params.max_new_tokens]
        reason = "length"
        if len(ids) < params.max_new_tokens:
            ids, reason = [*ids, EOS], "stop"
        for i, token_id in enumerate(ids):
            await self.resumed.wait()
            await asyncio.sleep(self.pauses.get(i, 0))
            if failure is not None and i >= self.fail_after:
                break
            is_last = i == len(ids) - 1
            if is_last:
                self._live.pop(request.request_id, None)
            entry = TokenLogprobs(logprob=-0.5, top_ids=[token_id, 65], top_logprobs=[-0.5, -1.5])
            scored = [None, *[entry] * (len(request.prompt_token_ids) - 1)]
            output = RequestOutput(
                request_id=request.request_id,
                new_token_ids=[token_id],
                logprobs=None if params.logprobs is None else [entry],
                prompt_logprobs=scored if params.prompt_logprobs is not None and i == 0 else None,
                finish_reason=reason if is_last else None,
                num_cached_tokens=1,
            )
            sink.on_output(output)
        if failure is not None:
            await asyncio.sleep(0.02 if self.fail_after else 0)  # time for the status line to go out
            self._live.pop(request.request_id, None)
            sink.on_output(RequestOutput(request_id=request.request_id, finish_reason="error", error=failure))
