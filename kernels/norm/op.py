"""RMSNorm, alone or of a residual sum; fp32 statistics, a backward that keeps one number a row beside the input.

Shape letters: N rows (any leading dimensions), D width.
"""

from typing import Any

import torch

from ..backend import Backend


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float, *, backend: Backend = "torch") -> torch.Tensor:
    """RMSNorm over the last dimension, `x / sqrt(mean(x^2) + eps) * weight` (arXiv:1910.07467).

    x [..., D] of any float dtype; weight_D [D]. Statistics and the product are taken in fp32 (fp64 for fp64 input); the
    result has the shape and dtype of x. Raises ValueError if the width of x and weight_D differ, or for what the
    Triton norm does not do: fp64, rows wider than 16384.
    """
    if x.shape[-1:] != weight_D.shape:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight_D.shape)}, the input's last dimension is {x.shape[-1]}"
        )
    if backend == "triton":
        return _triton_norm(x, None, weight_D, eps)[1]
    if not torch.is_grad_enabled():  # spares inference the cost of an autograd function
        return _normed(x, weight_D, eps)[0]
    return _RmsNorm.apply(x, weight_D, eps)  # type: ignore[no-any-return, no-untyped-call]


def add_rms_norm(
    x: torch.Tensor, branch: torch.Tensor, weight_D: torch.Tensor, eps: float, *, backend: Backend = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the residual sum `x + branch`, and `rms_norm` of it.

    x and branch [..., D] of one shape and dtype; both results have them too. With Triton the sum is read no second
    time, and its two gradients leave as one, which serves x and branch. Raises ValueError as `rms_norm` does, or if
    shapes or dtypes differ.
    """
    if x.shape != branch.shape or x.dtype != branch.dtype:
        raise ValueError(
            f"add_rms_norm: x is {tuple(x.shape)} {x.dtype}, branch {tuple(branch.shape)} {branch.dtype}; they must "
            "have one shape and dtype"
        )
    if backend == "triton" and x.shape[-1:] == weight_D.shape:
        return _triton_norm(x, branch, weight_D, eps)
    total = x + branch
    return total, rms_norm(total, weight_D, eps)


def _triton_norm(
    x: torch.Tensor, branch: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton import MOST_WIDTH, rms_norm_forward

    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight_D.numel() > MOST_WIDTH:
        raise ValueError(
            f"the Triton norm takes fp32, bf16 and fp16 and rows up to {MOST_WIDTH} wide, got {x.dtype} and "
            f"{weight_D.numel()}: use kernels=torch"
        )
    total, normed, _ = rms_norm_forward(x, branch, weight_D, eps)
    return total, normed


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
