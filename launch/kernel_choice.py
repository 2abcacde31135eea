"""Which implementation computes each operation: the key `kernels`, the device, and what is installed."""

import os
from importlib.util import find_spec
from typing import Literal

import torch

from ..kernels.backend import TORCH, VERIFIED, Backends, resolve
from ..moe.config import ModelConfig

Kernels = Literal["auto", "torch", "triton"]
_MOST_HEAD_WIDTH = 256  # of the Triton attention


def choose_backends(kernels: Kernels, model: ModelConfig, precision: str, device: torch.device) -> Backends:
    """Return the backends of `model` in `precision` on `device`; ValueError where Triton is asked for and cannot."""
    installed = find_spec("triton") is not None
    if kernels == "auto" and not installed:
        return TORCH
    if kernels == "triton":
        if not installed:
            raise ValueError("kernels=triton, but Triton is not installed: pip install 'sigmoe[gpu]'")
        _check(model, precision, device)
    return resolve(kernels, device.type)


def backends_note(kernels: Kernels, device: torch.device) -> str | None:
    """Say what `auto` leaves to torch on a GPU."""
    if kernels != "auto" or device.type != "cuda" or VERIFIED:
        return None
    return "kernels=auto: torch, since no Triton kernel has been verified on a GPU yet; kernels=triton runs them"


def _check(model: ModelConfig, precision: str, device: torch.device) -> None:
    """Raise ValueError for what Triton does not compute, or not here."""
    if precision == "fp64":
        raise ValueError("precision=fp64 takes kernels=torch: the Triton kernels compute in fp32")
    for name, size in (("dim", model.dim), ("expert_dim", model.expert_dim)):
        if size % 16:
            raise ValueError(f"model.{name}={size}: kernels=triton takes multiples of 16, or use kernels=torch")
    if model.head_width > _MOST_HEAD_WIDTH:
        raise ValueError(
            f"model.head_dim={model.head_width}: kernels=triton takes up to {_MOST_HEAD_WIDTH}, or use kernels=torch"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "kernels=triton needs a GPU; on a CPU its kernels run in Triton's interpreter alone, which is slow: "
            "set TRITON_INTERPRET=1, or use kernels=torch"
        )
    if device.type == "cpu" and precision != "fp32":
        raise ValueError(f"precision={precision}: Triton's interpreter computes right in fp32 alone")
