"""Which implementation computes each operation of a run: the key `kernels`, the device, and what is installed."""

import os
from importlib.util import find_spec

import torch

from ..kernels.backend import TORCH, VERIFIED, Backends, resolve
from .train_config import TrainConfig


def choose_backends(config: TrainConfig, device: torch.device) -> Backends:
    """Return the backends of a run on `device`; ValueError where it asks for Triton, which cannot do it here."""
    installed = find_spec("triton") is not None
    if config.kernels == "auto" and not installed:
        return TORCH
    if config.kernels == "triton":
        if not installed:
            raise ValueError("kernels=triton, but Triton is not installed: pip install 'sigmoe[gpu]'")
        if config.precision == "fp64":
            raise ValueError("precision=fp64 takes kernels=torch: the Triton kernels compute in fp32")
        for name in ("dim", "expert_dim"):
            if getattr(config.model, name) % 16:
                size = getattr(config.model, name)
                raise ValueError(f"model.{name}={size}: kernels=triton takes multiples of 16, or use kernels=torch")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                "kernels=triton needs a GPU; on a CPU its kernels run in Triton's interpreter alone, which is slow: "
                "set TRITON_INTERPRET=1, or use kernels=torch"
            )
        if device.type == "cpu" and config.precision != "fp32":
            raise ValueError(f"precision={config.precision}: Triton's interpreter computes right in fp32 alone")
    return resolve(config.kernels, device.type)


def backends_note(config: TrainConfig, device: torch.device) -> str | None:
    """Say what `auto` leaves to torch on a GPU."""
    if config.kernels != "auto" or device.type != "cuda" or VERIFIED:
        return None
    return "kernels=auto: torch, since no Triton kernel has been verified on a GPU yet; kernels=triton runs them"
