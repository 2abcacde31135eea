"""Attention of new tokens over keys and values that are kept, without autograd.

Shape letters: B sequences, S new positions, J kept positions (the new ones at their end), H query heads, G kv heads, C
head width.
"""

import torch
from torch.nn import functional


def cached_attention(
    q_BSHC: torch.Tensor, k_BGJC: torch.Tensor, v_BGJC: torch.Tensor, bias_B1SJ: torch.Tensor | None
) -> torch.Tensor:
    """Softmax attention of the last S positions over all J; `bias_B1SJ` as `cached_bias` makes it.

    All of one dtype, the bias too; G divides H. Returns [B, S, H, C].
    """
    out_BHSC = functional.scaled_dot_product_attention(
        q_BSHC.transpose(1, 2), k_BGJC, v_BGJC, attn_mask=bias_B1SJ, enable_gqa=True
    )
    return out_BHSC.transpose(1, 2)


def cached_bias(
    start_BS: torch.Tensor, first: int, num_keys: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """-inf where a key is out of sight, else 0: [B, 1, S, J]; None where every query sees every key.

    The keys are the positions first..first+num_keys-1, the queries the last S of them; query i sees key j where
    `start[i] <= j <= i` and, with a window, `i - j < window`.
    """
    j = torch.arange(first, first + num_keys, device=start_BS.device)
    i = j[num_keys - start_BS.shape[1] :, None]
    hidden_BSJ = (j > i) | (j < start_BS[..., None])
    if window is not None:
        hidden_BSJ = hidden_BSJ | (i - j >= window)
    if not hidden_BSJ.any():
        return None
    bias_BSJ = torch.zeros(hidden_BSJ.shape, dtype=dtype, device=start_BS.device)
    return bias_BSJ.masked_fill_(hidden_BSJ, -torch.inf)[:, None]
