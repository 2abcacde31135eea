"""Causal self-attention inside documents, and of new tokens over what is kept of earlier ones.

Shape letters: B sequences, S positions, D model width, H query heads, G key/value heads, C head width.
"""

import torch
from torch import Tensor, nn

from ..kernels.attention import attention, cached_attention
from ..kernels.backend import TORCH, Backend, Backends
from ..kernels.linear import linear, linear_forward, packed
from ..kernels.rope import rope, rotate
from .cache import CacheStep, KeyValueCache
from .config import ModelConfig


class QKNorm(nn.Module):
    """Norms queries or keys, each head or the whole width, and rotates them: one operation."""

    def __init__(self, width: int, eps: float, backend: Backend = "torch") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.backend = eps, backend

    def forward(self, x_BSHC: Tensor, position_BS: Tensor, theta: float) -> Tensor:
        """Norm, then rotate by position."""
        return rope(x_BSHC, position_BS, theta, norm_weight=self.weight, eps=self.eps, backend=self.backend)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, optional QK-norm and sliding window."""

    def __init__(self, config: ModelConfig, layer: int, backends: Backends = TORCH) -> None:
        super().__init__()
        self.config, self.layer, self.backends = config, layer, backends
        queries, keys = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
        self.q_proj = nn.Linear(config.dim, queries, bias=False)
        self.k_proj = nn.Linear(config.dim, keys, bias=False)
        self.v_proj = nn.Linear(config.dim, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.dim, bias=False)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = QKNorm(config.head_width if per_head else queries, config.norm_eps, backends.rope)
            self.k_norm = QKNorm(config.head_width if per_head else keys, config.norm_eps, backends.rope)
        self.qkv: Tensor | None = None  # the first three weights in one, once they are packed

    def forward(self, x_BSD: Tensor, start_BS: Tensor, position_BS: Tensor) -> Tensor:
        """Attend from every token to those of its document at or before it."""
        # The heads of this process, which may hold some of them.
        config, shape = self.config, (*x_BSD.shape[:2], -1, self.config.head_width)
        q_BSHC = linear(x_BSD, self.q_proj.weight).view(shape)
        k_BSGC = linear(x_BSD, self.k_proj.weight).view(shape)
        v_BSGC = linear(x_BSD, self.v_proj.weight).view(shape)
        if config.qk_norm == "none":
            q_BSHC = rope(q_BSHC, position_BS, config.rope_theta, backend=self.backends.rope)
            k_BSGC = rope(k_BSGC, position_BS, config.rope_theta, backend=self.backends.rope)
        else:
            q_BSHC = self.q_norm(q_BSHC, position_BS, config.rope_theta)
            k_BSGC = self.k_norm(k_BSGC, position_BS, config.rope_theta)
        window, backend = config.sliding_window, self.backends.attention
        out_BSHC = attention(q_BSHC, k_BSGC, v_BSGC, start_BS, window=window, backend=backend)
        return linear(out_BSHC.flatten(2), self.o_proj.weight)

    def extend(self, x_BSD: Tensor, step: CacheStep, cache: KeyValueCache) -> Tensor:
        """Attend from new tokens to those of their documents in `cache` and among themselves; no autograd."""
        config, (batch, length, _) = self.config, x_BSD.shape
        heads = [config.num_heads, config.num_kv_heads]
        qkv_BSHC = self._project(x_BSD.flatten(0, 1)).view(batch, length, -1, config.head_width)
        v_BSGC = qkv_BSHC[:, :, sum(heads) :]
        qk_BSHC = qkv_BSHC[:, :, : sum(heads)]
        if config.qk_norm == "none":
            q_BSHC, k_BSGC = torch.split(rotate(qk_BSHC, step.cos_BS1Z, step.sin_BS1Z), heads, dim=2)
        else:
            q_BSHC, k_BSGC = (
                rotate(x_BSHC, step.cos_BS1Z, step.sin_BS1Z, norm_weight=norm, eps=config.norm_eps)
                for x_BSHC, norm in zip(torch.split(qk_BSHC, heads, dim=2), self._norms())
            )
        cache.store(self.layer, k_BSGC, v_BSGC)
        backend = self.backends.attention
        if step.sight is None:
            window = config.sliding_window
            out_BSHC = attention(q_BSHC, k_BSGC, v_BSGC, step.start_BS, window=window, backend=backend)
        else:
            kept = cache.stored(self.layer, step.sight.first, length)
            out_BSHC = cached_attention(q_BSHC, *kept, step.sight, backend=backend)
        return linear_forward(out_BSHC.reshape(batch * length, -1), self.o_proj.weight).view_as(x_BSD)

    def pack(self) -> None:
        """Make the weights good for `extend` alone, and faster there."""
        self.qkv = packed(torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]).detach())
        output = packed(self.o_proj.weight)
        del self.q_proj, self.k_proj, self.v_proj, self.o_proj.weight
        self.o_proj.weight = output

    def _project(self, x_TD: Tensor) -> Tensor:
        """Queries, keys and values of all heads, `[T, (H + 2G) C]`."""
        if self.qkv is not None:
            return linear_forward(x_TD, self.qkv)
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        return torch.cat([linear_forward(x_TD, weight_ND) for weight_ND in weights], dim=-1)

    def _norms(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.config.qk_norm == "none" else (self.q_norm.weight, self.k_norm.weight)
