"""The memory-bound operations of a layer, as each contender computes them, on the same inputs.

Shape letters: T tokens, D width, H heads, C head width (D = H*C), F = D for SwiGLU.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.backend import Backend
from ..kernels.norm import add_rms_norm, rms_norm
from ..kernels.rope import rope, rotation
from ..kernels.swiglu import swiglu

Operation = Literal["rms_norm", "add_rms_norm", "qk_norm_head", "qk_norm_width", "swiglu"]
Forward = Callable[[], Tensor | tuple[Tensor, ...]]
THETA, EPS = 1e6, 1e-6


@dataclass(frozen=True, kw_only=True)
class NormShape:
    """Of the input."""

    tokens: int
    dim: int
    head_dim: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.dim % self.head_dim or self.head_dim % 2:
            raise ValueError(f"dim must be a multiple of head_dim, and head_dim even, got {self.dim}, {self.head_dim}")

    def elements(self, operation: Operation) -> tuple[int, int]:
        """Return how many numbers a forward and a backward must read and write, in rows of D: weights aside."""
        match operation:
            case "add_rms_norm":  # two in and two out, each way: three gradients and the sum
                rows = (4, 4)
            case "swiglu":
                rows = (3, 5)
            case _:
                rows = (2, 3)
        return rows[0] * self.tokens * self.dim, rows[1] * self.tokens * self.dim


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every contender is given; `leaves` want gradients."""

    operation: Operation
    leaves: tuple[Tensor, ...]  # x, the branch or none, the norm's weight or none
    position_BS: Tensor
    cos_BS1Z: Tensor  # in the dtype of x: only our own makes them itself
    sin_BS1Z: Tensor

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The norm's, where there is one."""
        return () if self.operation == "swiglu" else self.leaves[-1:]


def draw(operation: Operation, shape: NormShape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return random inputs, the same in every process on this device."""
    generator = torch.Generator(device).manual_seed(0)
    T, D, C = shape.tokens, shape.dim, shape.head_dim
    sizes: dict[Operation, tuple[tuple[int, ...], ...]] = {
        "rms_norm": ((T, D), (D,)),
        "add_rms_norm": ((T, D), (T, D), (D,)),
        "qk_norm_head": ((1, T, D // C, C), (C,)),
        "qk_norm_width": ((1, T, D // C, C), (D,)),
        "swiglu": ((T, 2 * D),),
    }
    position_BS = torch.arange(T, device=device)[None] % 4096
    cos, sin = rotation(position_BS, THETA, C, torch.float32)
    return Inputs(
        operation=operation,
        leaves=tuple(
            torch.randn(size, generator=generator, device=device, dtype=dtype).requires_grad_()
            for size in sizes[operation]
        ),
        position_BS=position_BS,
        cos_BS1Z=cos.to(dtype),
        sin_BS1Z=sin.to(dtype),
    )


def build(contender: str, inputs: Inputs) -> Forward:
    """Return the forward of `contender`: sigmoe, eager (torch's own), compiled (the same), or a peer on a GPU."""
    match contender:
        case "sigmoe":
            return _sigmoe(inputs)
        case "eager":
            return lambda: _eager(inputs)
        case "compiled":
            return torch.compile(lambda: _eager(inputs))
    forward: Forward = importlib.import_module("..norm_peers", __name__).peer(contender, inputs)
    return forward


def _sigmoe(inputs: Inputs) -> Forward:
    backend: Backend = "triton" if inputs.leaves[0].is_cuda else "torch"
    match inputs.operation:
        case "rms_norm":
            x, weight = inputs.leaves
            return lambda: rms_norm(x, weight, EPS, backend=backend)
        case "add_rms_norm":
            x, branch, weight = inputs.leaves
            return lambda: add_rms_norm(x, branch, weight, EPS, backend=backend)
        case "swiglu":
            (x,) = inputs.leaves
            return lambda: swiglu(x, backend=backend)
    x, weight = inputs.leaves
    return lambda: rope(x, inputs.position_BS, THETA, norm_weight=weight, eps=EPS, backend=backend)


def _eager(inputs: Inputs) -> Tensor | tuple[Tensor, ...]:
    match inputs.operation:
        case "rms_norm":
            x, weight = inputs.leaves
            return functional.rms_norm(x, weight.shape, weight, EPS)
        case "add_rms_norm":
            x, branch, weight = inputs.leaves
            total = x + branch
            return total, functional.rms_norm(total, weight.shape, weight, EPS)
        case "swiglu":
            gate, up = inputs.leaves[0].chunk(2, -1)
            return functional.silu(gate) * up
    x, weight = inputs.leaves
    flat = x if inputs.operation == "qk_norm_head" else x.flatten(-2)
    first, second = functional.rms_norm(flat, weight.shape, weight, EPS).view_as(x).chunk(2, -1)
    cos, sin = inputs.cos_BS1Z, inputs.sin_BS1Z
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
