"""RMSNorm in plain maths, for the tests."""

import torch


def rms_norm_reference(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D
