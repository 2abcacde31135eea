"""A linear map without bias, its three products by `product`.

Shape letters: D input width, N output width, T tokens (all leading dimensions together).
"""

from typing import Any

import torch

from .product import product


def linear(x: torch.Tensor, weight_ND: torch.Tensor) -> torch.Tensor:
    """`x @ weight_ND.T`: x [..., D] and weight_ND [N, D] of one float dtype -> [..., N].

    Raises ValueError if the widths differ.
    """
    if x.shape[-1] != weight_ND.shape[1]:
        raise ValueError(f"linear: the input is {x.shape[-1]} wide, the weight takes {weight_ND.shape[1]}")
    return _Linear.apply(x, weight_ND)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_ND: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight_ND)
        return product(x.reshape(-1, x.shape[-1]), weight_ND).view(*x.shape[:-1], weight_ND.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight_ND = ctx.saved_tensors
        grad_TN = grads[0].reshape(-1, weight_ND.shape[0])
        grad_x = product(grad_TN, weight_ND.t()).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight = product(grad_TN.t(), x.reshape(-1, x.shape[-1]).t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight
