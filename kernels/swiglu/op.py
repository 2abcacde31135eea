"""SwiGLU with a backward that keeps its input alone and recomputes the activation.

Shape letters: T tokens, F hidden width, G = 2F (gate columns, then up columns).
"""

from typing import Any

import torch
from torch.nn import functional

from ..backend import Backend


def swiglu(gate_up_TG: torch.Tensor, *, backend: Backend = "torch") -> torch.Tensor:
    """`silu(gate) * up` (Shazeer 2020, arXiv:2002.05202).

    gate_up_TG [..., 2F], any float dtype: the first F columns are the gate, the rest up. Returns [..., F], same dtype.
    Raises ValueError if the last dimension is odd, or for fp64 with Triton.
    """
    if gate_up_TG.shape[-1] % 2:
        raise ValueError(
            f"swiglu: the last dimension holds gate and up halves and must be even, not {gate_up_TG.shape[-1]}"
        )
    if backend == "triton":
        return _triton_swiglu(gate_up_TG)
    return _Swiglu.apply(gate_up_TG)  # type: ignore[no-any-return, no-untyped-call]


def _triton_swiglu(gate_up_TG: torch.Tensor) -> torch.Tensor:
    from .triton import swiglu_of

    if gate_up_TG.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the Triton SwiGLU takes fp32, bf16 and fp16, not {gate_up_TG.dtype}: use kernels=torch")
    act_TF: torch.Tensor = swiglu_of(gate_up_TG)
    return act_TF


def swiglu_forward(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """The forward arithmetic, without autograd."""
    gate_TF, up_TF = gate_up_TG.chunk(2, dim=-1)
    return functional.silu(gate_TF).mul_(up_TF)


def swiglu_backward(grad_TF: torch.Tensor, gate_up_TG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation again and the gradient of its input: `(activation_TF, grad_gate_up_TG)`, without autograd."""
    gate_TF, up_TF = gate_up_TG.chunk(2, dim=-1)
    grad_TG = torch.empty_like(gate_up_TG, memory_format=torch.contiguous_format)
    grad_gate_TF, grad_up_TF = grad_TG.chunk(2, dim=-1)
    silu_TF = functional.silu(gate_TF)
    torch.mul(grad_TF, silu_TF, out=grad_up_TF)
    torch.mul(grad_TF, up_TF, out=grad_gate_TF)
    torch.ops.aten.silu_backward.grad_input(grad_gate_TF, gate_TF, grad_input=grad_gate_TF)
    return silu_TF.mul_(up_TF), grad_TG


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TG: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up_TG)
        return swiglu_forward(gate_up_TG)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (gate_up_TG,) = ctx.saved_tensors
        return swiglu_backward(grads[0], gate_up_TG)[1]
