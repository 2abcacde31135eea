"""Output head and cross-entropy of each contender, on the same hidden states, weight and labels.

Shape letters: T tokens, D model width, V vocabulary.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..kernels.backend import Backend
from ..kernels.linear_cross_entropy import linear_cross_entropy

_CHECKPOINTED = 1024  # tokens a chunk


@dataclass(frozen=True, kw_only=True)
class LossShape:
    """What one pass computes."""

    tokens: int
    dim: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")

    @property
    def flops(self) -> int:
        """Of the three products of a forward and a backward."""
        return 6 * self.tokens * self.dim * self.vocab_size


@dataclass(frozen=True, kw_only=True)
class HeadInputs:
    """What every contender is given."""

    x_TD: Tensor
    weight_VD: Tensor
    label_T: Tensor


def draw(shape: LossShape, device: torch.device, dtype: torch.dtype) -> HeadInputs:
    """Return random inputs, the same in every process on this device; an eighth of the tokens has no label."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype).mul_(scale).requires_grad_()

    label_T = torch.randint(shape.vocab_size, (shape.tokens,), generator=generator, device=device)
    label_T[::8] = -100
    return HeadInputs(
        x_TD=normal(shape.tokens, shape.dim),
        weight_VD=normal(shape.vocab_size, shape.dim, scale=shape.dim**-0.5),
        label_T=label_T,
    )


def build_loss(contender: str, inputs: HeadInputs) -> Callable[[], Tensor]:
    """Return a contender's forward, to the sum of the losses.

    sigmoe; whole: all logits at once; checkpointed: logits chunk by chunk, computed again in the backward; torch: its
    own chunked function; liger: Liger's, whose weight gradient grows in bf16; liger_fp32: in fp32, as ours.
    """
    x_TD, weight_VD, label_T = inputs.x_TD, inputs.weight_VD, inputs.label_T
    match contender:
        case "sigmoe":
            backend: Backend = "triton" if x_TD.is_cuda else "torch"
            return lambda: linear_cross_entropy(x_TD, weight_VD, label_T, backend=backend)[0]
        case "whole":
            return lambda: _whole(x_TD, weight_VD, label_T)
        case "checkpointed":
            return lambda: _checkpointed(inputs)
        case "torch":
            # New in torch 2.13; without options it is `whole`.
            chunked, options = functional.linear_cross_entropy, nn.LinearCrossEntropyOptions()
            return lambda: chunked(x_TD, weight_VD, label_T, reduction="sum", options=options)
        case "liger" | "liger_fp32":
            fused = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
            wide = torch.float32 if contender == "liger_fp32" else None
            return lambda: fused(x_TD, weight_VD, label_T, reduction="sum", accum_dtype=wide)
    raise ValueError(f"peers of the loss are whole, checkpointed, torch, liger and liger_fp32, not {contender}")


def _whole(x_TD: Tensor, weight_VD: Tensor, label_T: Tensor) -> Tensor:
    return functional.cross_entropy((x_TD @ weight_VD.t()).float(), label_T, reduction="sum")


def _checkpointed(inputs: HeadInputs) -> Tensor:
    rows = [slice(begin, begin + _CHECKPOINTED) for begin in range(0, inputs.x_TD.shape[0], _CHECKPOINTED)]
    x_TD, weight_VD, label_T = inputs.x_TD, inputs.weight_VD, inputs.label_T
    parts = [checkpoint(_whole, x_TD[some], weight_VD, label_T[some], use_reentrant=False) for some in rows]
    return torch.stack(parts).sum()
