"""Rotary position embedding in plain maths, for the tests."""

import torch


def rope_reference(
    x_BSHC: torch.Tensor,
    position_BS: torch.Tensor,
    theta: float,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Optional RMSNorm (per head, or over all heads together), then `x cos + rotate_half(x) sin` (arXiv:2104.09864)."""
    C = x_BSHC.shape[-1]
    x = x_BSHC
    if norm_weight is not None:
        flat = x if norm_weight.numel() == C else x.flatten(-2)
        x = (flat / (flat.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight).view_as(x)
    frequency = theta ** (-torch.arange(0, C, 2, dtype=x.dtype, device=x.device) / C)
    angle = (position_BS.to(x.dtype)[..., None] * frequency).repeat(1, 1, 2)[:, :, None]
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()
