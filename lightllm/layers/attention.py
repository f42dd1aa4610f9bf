"""The attention half of a decoder layer: projections, rotary positions, and the backend in between."""

from torch import Tensor

from lightllm.attention.base import AttentionBackend, AttentionLayer, RotatingBackend
from lightllm.device.forward_batch import ForwardBatch
from lightllm.layers.linear import LinearMethod
from lightllm.layers.norm import RMSNorm
from lightllm.layers.ops import Ops
from lightllm.model_config import ModelConfig


class Attention:
    """Causal grouped-query attention. https://arxiv.org/abs/2305.13245

    Args:
        config: heads, scale, window and softcap.
        index: of the layer.
        qkv: q, k and v fused in this order: [(num_q_heads + 2 * num_kv_heads) * head_dim, hidden_size].
        o: [hidden_size, num_q_heads * head_dim].
        q_norm, k_norm: of each head before it is rotated; None for none.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        *,
        qkv: LinearMethod,
        o: LinearMethod,
        backend: AttentionBackend,
        ops: Ops,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        self.layer = AttentionLayer(
            index, config.attention_scale, config.window(index), config.attn_logit_softcapping
        )
        self.num_q_heads = config.num_attention_heads
        self.num_qk_heads = config.num_attention_heads + config.num_key_value_heads
        self.head_dim = config.head_dim
        self.qkv = qkv
        self.o = o
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.backend = backend
        self.ops = ops

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch) -> Tensor:
        """Map [num_tokens, hidden_size] to a new tensor of the same shape; writes keys and values.

        Args:
            cos, sin: [num_tokens, rotary_dim / 2] float32.
        """
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)  # [num_tokens, q + k + v heads, head_dim]
        qk, v = qkv[:, : self.num_qk_heads], qkv[:, self.num_qk_heads :]
        q, k = qk[:, : self.num_q_heads], qk[:, self.num_q_heads :]
        heads: tuple[Tensor, ...] = (qk,)
        if self.q_norm is not None and self.k_norm is not None:
            heads = q, k = self.q_norm(q), self.k_norm(k)
        if isinstance(self.backend, RotatingBackend):
            attended = self.backend.rotate_and_forward(q, k, v, (cos, sin), self.layer, batch)
        else:
            for x in heads:
                self.ops.rotate_(x, cos, sin)
            attended = self.backend.forward(q, k, v, self.layer, batch)
        if batch.on_kv_written is not None:
            batch.on_kv_written(self.layer.index)
        return self.o(attended)
