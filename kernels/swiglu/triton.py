"""SwiGLU alone in Triton: one pass each way, nothing kept but the input.

Shape letters: T tokens, F hidden width, G = 2F (gate columns, then up columns).
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..triton import offset

_TILE = 2048  # elements of each half


@triton.jit
def _forward(gate_up, act, T, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    COLUMNS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    row = offset(tl.program_id(0) // COLUMNS, BLOCK_T) + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) % COLUMNS * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (row < T)[:, None] & (column < F)[None, :]
    at = row[:, None] * (2 * F) + column[None, :]
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + F + at, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(act + row[:, None] * F + column[None, :], value.to(act.dtype.element_ty), mask=mask)


@triton.jit
def _backward(grad, gate_up, grad_gate_up, T, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    COLUMNS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    row = offset(tl.program_id(0) // COLUMNS, BLOCK_T) + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) % COLUMNS * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (row < T)[:, None] & (column < F)[None, :]
    at = row[:, None] * (2 * F) + column[None, :]
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + F + at, mask=mask, other=0.0).to(tl.float32)
    back = tl.load(grad + row[:, None] * F + column[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    dtype = grad_gate_up.dtype.element_ty
    tl.store(grad_gate_up + at, (back * up * (sigmoid + silu * (1 - sigmoid))).to(dtype), mask=mask)
    tl.store(grad_gate_up + F + at, (back * silu).to(dtype), mask=mask)


def _blocks(F: int, device: torch.device) -> dict[str, int]:
    tile = _TILE if device.type == "cuda" else 64
    block_F = min(max(triton.next_power_of_2(F), 16), tile // 2)
    return {"BLOCK_T": tile // block_F, "BLOCK_F": block_F}


def _grid(T: int, F: int, blocks: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(T, blocks["BLOCK_T"]) * triton.cdiv(F, blocks["BLOCK_F"]),)


@torch.library.custom_op("sigmoe::swiglu", mutates_args=())
def swiglu_of(gate_up_TG: Tensor) -> Tensor:
    """Return silu(gate) * up, [..., F]."""
    act_TF = _empty(gate_up_TG)
    if act_TF.numel():
        F = act_TF.shape[-1]
        T, blocks = act_TF.numel() // F, _blocks(F, act_TF.device)
        _forward[_grid(T, F, blocks)](gate_up_TG.contiguous(), act_TF, T, F=F, **blocks)
    return act_TF


@swiglu_of.register_fake
def _empty(gate_up_TG: Tensor) -> Tensor:
    return gate_up_TG.new_empty(*gate_up_TG.shape[:-1], gate_up_TG.shape[-1] // 2)


@torch.library.custom_op("sigmoe::swiglu_backward", mutates_args=())
def swiglu_backward_of(grad_TF: Tensor, gate_up_TG: Tensor) -> Tensor:
    """Return the gradient of gate_up_TG."""
    grad_TG = _empty_gradient(grad_TF, gate_up_TG)
    if grad_TG.numel():
        F = grad_TF.shape[-1]
        T, blocks = grad_TF.numel() // F, _blocks(F, grad_TF.device)
        _backward[_grid(T, F, blocks)](grad_TF.contiguous(), gate_up_TG.contiguous(), grad_TG, T, F=F, **blocks)
    return grad_TG


@swiglu_backward_of.register_fake
def _empty_gradient(grad_TF: Tensor, gate_up_TG: Tensor) -> Tensor:
    return gate_up_TG.new_empty(gate_up_TG.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    return swiglu_backward_of(grad, *ctx.saved_tensors)


swiglu_of.register_autograd(_differentiate, setup_context=_save)


def compile_cases() -> Iterator[CompileCase]:
    """Yield both passes at a dense layer's width."""
    for name, kernel in (("swiglu", _forward), ("swiglu backward", _backward)):
        constants = {"F": 14336, **_blocks(14336, torch.device("cuda"))}
        signature = {name: "*bf16" for name in kernel.arg_names if name not in constants} | {"T": "i32:16"}
        yield CompileCase(name=name, kernel=kernel, signature=signature, constants=constants)
