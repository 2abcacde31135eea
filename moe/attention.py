"""Causal self-attention inside documents.

Shape letters: B sequences, S positions, D model width, H query heads, G key/value heads, C head width.
"""

import torch
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.linear import linear
from ..kernels.rope import rope
from .config import ModelConfig


class QKNorm(nn.Module):
    """Holds the weight of a query or key norm; the norm itself runs with the rotation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, optional QK-norm and sliding window."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
        self.q_proj = nn.Linear(config.dim, queries, bias=False)
        self.k_proj = nn.Linear(config.dim, keys, bias=False)
        self.v_proj = nn.Linear(config.dim, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.dim, bias=False)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = QKNorm(config.head_width if per_head else queries)
            self.k_norm = QKNorm(config.head_width if per_head else keys)

    def forward(self, x_BSD: Tensor, start_BS: Tensor, position_BS: Tensor) -> Tensor:
        """Attend from every token to those of its document at or before it."""
        batch, length, _ = x_BSD.shape
        config, c = self.config, self.config.head_width
        q_BSHC = linear(x_BSD, self.q_proj.weight).view(batch, length, config.num_heads, c)
        k_BSGC = linear(x_BSD, self.k_proj.weight).view(batch, length, config.num_kv_heads, c)
        v_BSGC = linear(x_BSD, self.v_proj.weight).view(batch, length, config.num_kv_heads, c)
        q_norm = self.q_norm.weight if config.qk_norm != "none" else None
        k_norm = self.k_norm.weight if config.qk_norm != "none" else None
        q_BSHC = rope(q_BSHC, position_BS, config.rope_theta, norm_weight=q_norm, eps=config.norm_eps)
        k_BSGC = rope(k_BSGC, position_BS, config.rope_theta, norm_weight=k_norm, eps=config.norm_eps)
        out_BSHC = attention(q_BSHC, k_BSGC, v_BSGC, start_BS, window=config.sliding_window)
        return linear(out_BSHC.reshape(batch, length, config.num_heads * c), self.o_proj.weight)
