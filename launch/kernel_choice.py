"""Which implementation computes each operation: the key `kernels`, the device, and what is installed."""

import os
from importlib.util import find_spec
from typing import Literal

import torch

from ..kernels.backend import TORCH, VERIFIED, Backends, resolve
from ..moe.config import ModelConfig

Kernels = Literal["auto", "torch", "triton"]
# What the Triton kernels of attention, norm, QK-norm and gate take; to import those takes Triton.
MOST_HEAD_WIDTH, MOST_DIM, MOST_QK_NORM, MOST_CHOICES, MOST_EXPERTS = 256, 16384, 8192, 16, 4096


def choose_backends(
    kernels: Kernels, model: ModelConfig, precision: str, device: torch.device, *, expert_tp: int = 1
) -> Backends:
    """Return the backends of `model` in `precision` on `device`; ValueError where Triton is asked for and cannot.

    `expert_tp`: so many processes share one expert.
    """
    if kernels == "torch":
        return TORCH
    refusal = _refusal(model, precision, device, expert_tp)
    if refusal is None:
        return resolve(kernels, device.type)
    if kernels == "triton":
        raise ValueError(refusal)
    return TORCH


def backends_note(kernels: Kernels, backends: Backends, device: torch.device) -> str | None:
    """Say where Triton computes, and why `auto` chose torch on a GPU."""
    if backends != TORCH:
        names = ", ".join(name for name, backend in vars(backends).items() if backend == "triton")
        here = "" if device.type == "cuda" else "; interpreted on this CPU, a step may take minutes"
        return f"Triton kernels: {names}{here}"
    if kernels != "auto" or device.type != "cuda":
        return None
    if VERIFIED:
        return "kernels=auto: torch, since Triton cannot compute this model here; kernels=triton says why"
    return "kernels=auto: torch, since no Triton kernel has been verified on a GPU yet; kernels=triton runs them"


def _refusal(model: ModelConfig, precision: str, device: torch.device, expert_tp: int) -> str | None:
    """Say what Triton does not compute, or not here, and what to change."""
    if find_spec("triton") is None:
        return "kernels=triton, but Triton is not installed: pip install 'sigmoe[gpu]'"
    if precision == "fp64":
        return "precision=fp64 takes kernels=torch: the Triton kernels compute in fp32"
    for name, size in (("dim", model.dim), ("expert_dim", model.expert_dim)):
        if size % 16:
            return f"model.{name}={size}: kernels=triton takes multiples of 16, or use kernels=torch"
    if model.expert_dim // expert_tp % 16:
        return (
            f"model.expert_dim={model.expert_dim}: kernels=triton takes a multiple of 16 on each of the {expert_tp} "
            "processes of an expert: choose another, set parallel.etp=1, or use kernels=torch"
        )
    normed = model.num_heads * model.head_width if model.qk_norm == "width" else 0
    experts = max(model.gated_experts, default=0) if model.router.name == "top_k" else 0
    for name, size, most in (
        ("model.dim", model.dim, MOST_DIM),
        ("model.head_dim", model.head_width, MOST_HEAD_WIDTH),
        ("model.qk_norm=width, heads x head_dim", normed, MOST_QK_NORM),
        ("router.top_k", model.router.top_k, MOST_CHOICES),
        ("router.num_experts", experts, MOST_EXPERTS),
    ):
        if size > most:
            return f"{name}={size}: kernels=triton takes up to {most}, or use kernels=torch"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "kernels=triton needs a GPU; on a CPU its kernels run in Triton's interpreter alone, which is slow: "
            "set TRITON_INTERPRET=1, or use kernels=torch"
        )
    if device.type == "cpu" and precision != "fp32":
        return f"precision={precision}: Triton's interpreter computes right in fp32 alone"
    return None
