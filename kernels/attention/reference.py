"""Attention in plain maths, for the tests."""

import torch


def attention_reference(
    q_BSHC: torch.Tensor,
    k_BSGC: torch.Tensor,
    v_BSGC: torch.Tensor,
    start_BS: torch.Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention with the whole S x S mask written out: `start[i] <= j <= i`, and `i - j < window`."""
    S, H, C = q_BSHC.shape[1:]
    copies = H // k_BSGC.shape[2]
    k_BSHC, v_BSHC = (x.repeat_interleave(copies, dim=2) for x in (k_BSGC, v_BSGC))
    score_BHSS = torch.einsum("bihc,bjhc->bhij", q_BSHC, k_BSHC) * (C**-0.5 if scale is None else scale)
    i, j = torch.arange(S, device=start_BS.device)[:, None], torch.arange(S, device=start_BS.device)
    visible_BSS = (j <= i) & (j >= start_BS[..., None])
    if window is not None:
        visible_BSS = visible_BSS & (i - j < window)
    weight_BHSS = score_BHSS.masked_fill(~visible_BSS[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhc->bihc", weight_BHSS, v_BSHC)
