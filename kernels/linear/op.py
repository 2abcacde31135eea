"""A linear map without bias, its three products by `product`.

Shape letters: D input width, N output width, T tokens (all leading dimensions together), M tokens and
zero rows after them.
"""

from typing import Any

import torch

from .product import padded, product


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
        x_TD = x.reshape(-1, x.shape[-1])
        out_TN = product(padded(x_TD), weight_ND)[: x_TD.shape[0]]
        return out_TN.view(*x.shape[:-1], weight_ND.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight_ND = ctx.saved_tensors
        x_TD = x.reshape(-1, x.shape[-1])
        grad_MN = padded(grads[0].reshape(-1, weight_ND.shape[0]))
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad_MN, weight_ND.t())[: x_TD.shape[0]].view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = product(grad_MN.t(), padded(x_TD).t())
        return grad_x, grad_weight
