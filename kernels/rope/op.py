"""Rotary position embedding in the rotate-half convention (transformers' Mixtral), its inverse as the backward.

Shape letters: B sequences, S positions, H heads, C head width, Z = C/2.
"""

from typing import Any

import torch

from ..backend import Backend
from ..norm import rms_norm


def rope(
    x_BSHC: torch.Tensor,
    position_BS: torch.Tensor,
    theta: float,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend = "torch",
) -> torch.Tensor:
    """Optional RMSNorm of queries or keys, then rotary embedding (Su et al. 2021, arXiv:2104.09864).

    x_BSHC [B, S, H, C], any float dtype; position_BS [B, S] integers; theta is the base of the frequencies
    `theta^(-2i/C)`; norm_weight [C] norms each head, [H*C] the whole width. Inside all is fp32; the result has the
    shape and dtype of x. Raises ValueError for an odd C or a norm_weight of another size, or for what the Triton
    kernels do not do: fp64, heads wider than 256, a norm over more than 8192.
    """
    H, C = x_BSHC.shape[-2:]
    if C % 2:
        raise ValueError(f"rope: the head width must be even, not {C}")
    if backend == "triton":
        return _triton_rope(x_BSHC, position_BS, theta, norm_weight, eps)
    if norm_weight is not None:
        x_BSHC = _norm(x_BSHC, norm_weight, eps, H, C)
    return _Rotate.apply(x_BSHC, *rotation(position_BS, theta, C, x_BSHC.dtype))  # type: ignore[no-any-return, no-untyped-call]


def _triton_rope(
    x_BSHC: torch.Tensor, position_BS: torch.Tensor, theta: float, norm_weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    from .triton import MOST_NORM_WIDTH, MOST_WIDTH, rope_forward

    H, C = x_BSHC.shape[-2:]
    norm_width = C if norm_weight is None else norm_weight.numel()
    if norm_width not in (C, H * C):
        raise _wrong_weight(norm_width, H, C)
    if x_BSHC.dtype not in (torch.float32, torch.bfloat16, torch.float16) or C > MOST_WIDTH:
        raise ValueError(
            f"the Triton rope takes fp32, bf16 and fp16 and heads up to {MOST_WIDTH} wide, got {x_BSHC.dtype} and {C}: "
            "use kernels=torch"
        )
    if norm_width > MOST_NORM_WIDTH:
        raise ValueError(f"the Triton rope norms a width up to {MOST_NORM_WIDTH}, not {norm_width}: use kernels=torch")
    frequency_Z = _frequencies(theta, C, torch.float32, x_BSHC.device)
    out_BSHC: torch.Tensor = rope_forward(x_BSHC, position_BS, frequency_Z, norm_weight, eps)[0]
    return out_BSHC


def rotation(position_BS: torch.Tensor, theta: float, C: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [B, S, 1, Z] of the angles for activations of `dtype`, which all layers may share."""
    # Angles are taken in fp32 at least and never in the activations' dtype: bf16 cannot tell position 256 from 257.
    wide = torch.promote_types(dtype, torch.float32)
    frequency_Z = _frequencies(theta, C, wide, position_BS.device)
    angle_BS1Z = (position_BS[..., None] * frequency_Z)[:, :, None]
    return angle_BS1Z.cos(), angle_BS1Z.sin()


def _frequencies(theta: float, C: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return theta ** (torch.arange(0, C, 2, dtype=dtype, device=device) / -C)


def rotate(
    x_BSHC: torch.Tensor,
    cos_BS1Z: torch.Tensor,
    sin_BS1Z: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`rope` without autograd, by the cosine and sine of `rotation`."""
    if norm_weight is not None:
        x_BSHC = _norm(x_BSHC, norm_weight, eps, *x_BSHC.shape[-2:])
    return _rotate(x_BSHC, cos_BS1Z, sin_BS1Z, 1.0)


def _norm(x_BSHC: torch.Tensor, weight: torch.Tensor, eps: float, H: int, C: int) -> torch.Tensor:
    if weight.numel() == C:
        return rms_norm(x_BSHC, weight, eps)
    if weight.numel() == H * C:
        return rms_norm(x_BSHC.flatten(-2), weight, eps).view(x_BSHC.shape)
    raise _wrong_weight(weight.numel(), H, C)


def _wrong_weight(size: int, H: int, C: int) -> ValueError:
    return ValueError(f"rope: norm_weight must have {C} (per head) or {H * C} (whole width) elements, not {size}")


def _rotate(x_BSHC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    x1, x2 = x_BSHC.to(cos.dtype).chunk(2, dim=-1)
    out = torch.empty(x_BSHC.shape, dtype=cos.dtype, device=cos.device)
    out1, out2 = out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin, value=sign)
    return out.to(x_BSHC.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHC: torch.Tensor, cos_BS1Z: torch.Tensor, sin_BS1Z: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_BS1Z, sin_BS1Z)
        return _rotate(x_BSHC, cos_BS1Z, sin_BS1Z, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # A rotation's transpose is the rotation back.
        cos_BS1Z, sin_BS1Z = ctx.saved_tensors
        return _rotate(grads[0], cos_BS1Z, sin_BS1Z, -1.0), None, None
