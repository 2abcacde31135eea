"""The one AdamW of all engines, over tensors that stand for canonical ones: whole, or a process's run of one."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .engine import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def build_adamw(decayed: Iterable[Tensor], rest: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over masters, its moments zero; each master has its own step. Masters without `.grad` stand."""
    groups = [
        {"params": list(decayed), "weight_decay": config.weight_decay},
        {"params": list(rest), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        for master in group["params"]:
            optimizer.state[master] = {
                "step": torch.zeros((), device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
    return optimizer
