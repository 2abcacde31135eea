"""Activations computed again in the backward instead of kept (Chen et al. 2016). Deterministic: no random state."""

from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..moe.attention import SelfAttention
from ..moe.experts import GroupedExperts
from ..moe.layer import Block
from ..moe.model import Transformer


def apply_recompute(model: Transformer, kind: Literal["none", "layer", "experts", "attention"]) -> None:
    """Recompute whole blocks, or the experts' products, or attention.

    Experts repeat no collective, attention those of a QK-norm over the width; a block repeats those of its forward but
    the last, whose result nothing in the backward wants: all ranks alike.
    """
    match kind:
        case "none":
            return
        case "layer":
            kept: type[nn.Module] = Block
        case "experts":
            kept = GroupedExperts
        case "attention":
            kept = SelfAttention
    for module in model.modules():
        if isinstance(module, kept):
            module.forward = _Recomputed(module.forward)


class _Recomputed:
    """A forward of which only the inputs are kept. Hooks of the module, with their collectives, stay outside."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args)
        return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=False)
