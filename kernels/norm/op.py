"""RMSNorm with fp32 statistics and a hand-written backward that keeps one number a row beside the input.

Shape letters: N rows (any leading dimensions), D width.
"""

from typing import Any

import torch


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, `x / sqrt(mean(x^2) + eps) * weight` (arXiv:1910.07467).

    x [..., D] of any float dtype; weight_D [D]. Statistics and the product are taken in fp32 (fp64 for fp64 input); the
    result has the shape and dtype of x. Raises ValueError if the width of x and weight_D differ.
    """
    if x.shape[-1:] != weight_D.shape:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight_D.shape)}, the input's last dimension is {x.shape[-1]}"
        )
    if not torch.is_grad_enabled():  # spares inference the cost of an autograd function
        return _normed(x, weight_D, eps)[0]
    return _RmsNorm.apply(x, weight_D, eps)  # type: ignore[no-any-return, no-untyped-call]


def _normed(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and one over the root mean square of each row [..., 1]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_ND = x.to(wide)
    rstd_N1 = x_ND.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x_ND * rstd_N1).mul_(weight_D.to(wide)).to(x.dtype), rstd_N1


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        normed, rstd_N1 = _normed(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, rstd_N1)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight_D, rstd_N1 = ctx.saved_tensors
        wide, D = rstd_N1.dtype, weight_D.numel()
        grad_ND, weight = grads[0].to(wide), weight_D.to(wide)
        normed_ND = x.to(wide) * rstd_N1
        product_ND = grad_ND * normed_ND
        grad_weight = product_ND.reshape(-1, D).sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        # d x = rstd (g w - normed mean(g w normed)); the row means are one matrix-vector product.
        mean_N1 = (product_ND @ weight / D)[..., None]
        grad_x = torch.mul(grad_ND, weight, out=product_ND).addcmul_(normed_ND, mean_N1, value=-1).mul_(rstd_N1)
        return grad_x.to(x.dtype), grad_weight, None
