"""Attention of new tokens over keys and values that are kept, without autograd.

Shape letters: B sequences, S new positions, J kept positions (the new ones at their end), H query heads, G kv heads, C
head width.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

from ..backend import Backend
from .op import check_triton


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Which kept keys the new queries see, the same in all layers.

    The keys are the positions first..first+num_keys-1, the queries the last S of them; query i sees key j where
    `start[i] <= j <= i` and, with a window, `i - j < window`.
    """

    start_BS: torch.Tensor  # int64
    first: int
    num_keys: int
    window: int | None
    dtype: torch.dtype  # of the keys
    sees_all: bool = False  # True where it is known that every query sees every key; False says nothing

    @cached_property
    def bias_B1SJ(self) -> torch.Tensor | None:
        """-inf where a key is out of sight, else 0: [B, 1, S, J]; None where every query sees every key."""
        if self.sees_all:
            return None
        j = torch.arange(self.first, self.first + self.num_keys, device=self.start_BS.device)
        i = j[self.num_keys - self.start_BS.shape[1] :, None]
        hidden_BSJ = (j > i) | (j < self.start_BS[..., None])
        if self.window is not None:
            hidden_BSJ = hidden_BSJ | (i - j >= self.window)
        if not hidden_BSJ.any():
            return None
        bias_BSJ = torch.zeros(hidden_BSJ.shape, dtype=self.dtype, device=self.start_BS.device)
        return bias_BSJ.masked_fill_(hidden_BSJ, -torch.inf)[:, None]


def cached_attention(
    q_BSHC: torch.Tensor, k_BGJC: torch.Tensor, v_BGJC: torch.Tensor, sight: Sight, *, backend: Backend = "torch"
) -> torch.Tensor:
    """Softmax attention of the last S positions over all J keys, of which `sight` says who sees which.

    All of one dtype; G divides H. Returns [B, S, H, C]. Raises ValueError for what Triton does not do: fp64, heads
    wider than 256.
    """
    if backend == "triton":
        from .triton import attention_over_cache

        check_triton(q_BSHC, 1.0)
        out: torch.Tensor = attention_over_cache(q_BSHC, k_BGJC, v_BGJC, sight.start_BS, sight.first, sight.window)
        return out
    out_BHSC = functional.scaled_dot_product_attention(
        q_BSHC.transpose(1, 2), k_BGJC, v_BGJC, attn_mask=sight.bias_B1SJ, enable_gqa=True
    )
    return out_BHSC.transpose(1, 2)
