"""Causal self-attention inside documents, and of new tokens over what is kept of earlier ones.

Shape letters: B sequences, S positions, D model width, H query heads, G key/value heads, C head width.
"""

import torch
from torch import Tensor, nn

from ..kernels.attention import attention, cached_attention
from ..kernels.linear import linear, linear_few
from ..kernels.rope import rope, rotate
from .cache import CachedStep, KeyValueCache
from .config import ModelConfig


class QKNorm(nn.Module):
    """Holds the weight of a query or key norm; the norm itself runs with the rotation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, optional QK-norm and sliding window."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        queries, keys = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
        self.q_proj = nn.Linear(config.dim, queries, bias=False)
        self.k_proj = nn.Linear(config.dim, keys, bias=False)
        self.v_proj = nn.Linear(config.dim, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.dim, bias=False)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = QKNorm(config.head_width if per_head else queries)
            self.k_norm = QKNorm(config.head_width if per_head else keys)

    def forward(
        self, x_BSD: Tensor, start_BS: Tensor, position_BS: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attend from every token to those of its document at or before it; keep keys and values in an empty cache."""
        batch, length, _ = x_BSD.shape
        config, c = self.config, self.config.head_width
        q_BSHC = linear(x_BSD, self.q_proj.weight).view(batch, length, config.num_heads, c)
        k_BSGC = linear(x_BSD, self.k_proj.weight).view(batch, length, config.num_kv_heads, c)
        v_BSGC = linear(x_BSD, self.v_proj.weight).view(batch, length, config.num_kv_heads, c)
        q_norm, k_norm = self._norms()
        q_BSHC = rope(q_BSHC, position_BS, config.rope_theta, norm_weight=q_norm, eps=config.norm_eps)
        k_BSGC = rope(k_BSGC, position_BS, config.rope_theta, norm_weight=k_norm, eps=config.norm_eps)
        if cache is not None:
            cache.store(self.layer, k_BSGC, v_BSGC)
        out_BSHC = attention(q_BSHC, k_BSGC, v_BSGC, start_BS, window=config.sliding_window)
        return linear(out_BSHC.reshape(batch, length, config.num_heads * c), self.o_proj.weight)

    def decode(self, x_BSD: Tensor, step: CachedStep, cache: KeyValueCache) -> Tensor:
        """Attend from a few new tokens to those of their documents in `cache` and themselves; no autograd."""
        config, shape = self.config, (*x_BSD.shape[:2], -1, self.config.head_width)
        x_TD = x_BSD.flatten(0, 1)
        q_norm, k_norm = self._norms()
        q_BSHC = linear_few(x_TD, self.q_proj.weight).view(shape)
        k_BSGC = linear_few(x_TD, self.k_proj.weight).view(shape)
        v_BSGC = linear_few(x_TD, self.v_proj.weight).view(shape)
        q_BSHC = rotate(q_BSHC, step.cos_BS1Z, step.sin_BS1Z, norm_weight=q_norm, eps=config.norm_eps)
        k_BSGC = rotate(k_BSGC, step.cos_BS1Z, step.sin_BS1Z, norm_weight=k_norm, eps=config.norm_eps)
        cache.store(self.layer, k_BSGC, v_BSGC)
        k_BGJC, v_BGJC = cache.stored(self.layer, step.first, x_BSD.shape[1])
        out_BSHC = cached_attention(q_BSHC, k_BGJC, v_BGJC, step.bias_B1SJ)
        return linear_few(out_BSHC.reshape(len(x_TD), -1), self.o_proj.weight).view_as(x_BSD)

    def _norms(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.config.qk_norm == "none" else (self.q_norm.weight, self.k_norm.weight)
