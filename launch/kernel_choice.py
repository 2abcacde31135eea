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
    installed = find_spec("triton") is not None
    if kernels == "auto" and not installed:
        return TORCH
    if kernels == "triton":
        if not installed:
            raise ValueError("kernels=triton, but Triton is not installed: pip install 'sigmoe[gpu]'")
        _check(model, precision, device, expert_tp)
    return resolve(kernels, device.type)


def backends_note(kernels: Kernels, device: torch.device) -> str | None:
    """Say what `auto` leaves to torch on a GPU."""
    if kernels != "auto" or device.type != "cuda" or VERIFIED:
        return None
    return "kernels=auto: torch, since no Triton kernel has been verified on a GPU yet; kernels=triton runs them"


def _check(model: ModelConfig, precision: str, device: torch.device, expert_tp: int) -> None:
    """Raise ValueError for what Triton does not compute, or not here."""
    if precision == "fp64":
        raise ValueError("precision=fp64 takes kernels=torch: the Triton kernels compute in fp32")
    for name, size in (("dim", model.dim), ("expert_dim", model.expert_dim)):
        if size % 16:
            raise ValueError(f"model.{name}={size}: kernels=triton takes multiples of 16, or use kernels=torch")
    if model.expert_dim // expert_tp % 16:
        raise ValueError(
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
            raise ValueError(f"{name}={size}: kernels=triton takes up to {most}, or use kernels=torch")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "kernels=triton needs a GPU; on a CPU its kernels run in Triton's interpreter alone, which is slow: "
            "set TRITON_INTERPRET=1, or use kernels=torch"
        )
    if device.type == "cpu" and precision != "fp32":
        raise ValueError(f"precision={precision}: Triton's interpreter computes right in fp32 alone")
