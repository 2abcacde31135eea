"""Tensor parallelism (Megatron-LM, Shoeybi et al. 2019): cut parameters, and mappings around the products.

Shape letters: B sequences, S positions, H heads here, C head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.rope import rope
from ..moe.attention import QKNorm, SelfAttention
from ..moe.experts import DenseFFN
from ..moe.model import Transformer
from .megatron import copy, reduce
from .mesh import Axis, Mesh
from .vocabulary_parallel import VocabularyParallel


def apply_tensor_parallel(model: Transformer, mesh: Mesh) -> None:
    """Make every product of `model` (whose parameters are cut already) sum over tensor ranks."""
    axis = mesh.tp
    if axis.size == 1:
        return
    model.vocabulary = VocabularyParallel(axis, model.config.vocab_size, model.vocabulary.backend)
    for module in model.modules():
        apply = PRODUCTS.get(type(module))
        if apply is not None:
            apply(module, axis)


def split_product(module: nn.Module, axis: Axis) -> None:
    """Columns first, rows last: the module's input is the same on all, its output is each one's addend."""
    module.register_forward_pre_hook(lambda _, args: (copy(args[0], axis), *args[1:]))
    module.register_forward_hook(lambda _, args, out: reduce(out, axis))


def split_attention(module: SelfAttention, axis: Axis) -> None:
    """Each rank has some heads; norms of queries and keys follow them."""
    split_product(module, axis)
    match module.config.qk_norm:
        case "head":
            module.q_norm, module.k_norm = (HeadNorm(norm, axis) for norm in (module.q_norm, module.k_norm))
        case "width":
            module.q_norm, module.k_norm = (WidthNorm(norm, axis) for norm in (module.q_norm, module.k_norm))


# Submodule -> how its product is split. The experts' is in `expert_parallel.py`, the vocabulary's above.
PRODUCTS: dict[type[nn.Module], Callable[[Any, Axis], None]] = {
    SelfAttention: split_attention,  # q, k, v by columns (whole heads), o by rows
    DenseFFN: split_product,  # gate_up by columns, down by rows
}


class HeadNorm(QKNorm):
    """A norm by head: all have its weight, whose gradient each sees the part of its own heads."""

    def __init__(self, norm: QKNorm, axis: Axis) -> None:
        nn.Module.__init__(self)
        self.weight, self.eps, self.backend, self.axis = norm.weight, norm.eps, norm.backend, axis

    def forward(self, x_BSHC: Tensor, position_BS: Tensor, theta: float) -> Tensor:
        """Norm, then rotate by position."""
        weight = copy(self.weight, self.axis)
        return rope(x_BSHC, position_BS, theta, norm_weight=weight, eps=self.eps, backend=self.backend)


class WidthNorm(HeadNorm):
    """A norm over the width of all heads, of which each rank has some: the sum of squares goes around."""

    def forward(self, x_BSHC: Tensor, position_BS: Tensor, theta: float) -> Tensor:
        """Norm, then rotate by position."""
        wide = torch.promote_types(x_BSHC.dtype, torch.float32)
        heads, width = x_BSHC.shape[2:]
        here_BSHC = x_BSHC.to(wide)
        # Every rank goes on with the total in its own way, so its gradient is summed as well.
        square_BS11 = copy(reduce(here_BSHC.square().sum((2, 3), keepdim=True), self.axis), self.axis)
        scale_BS11 = (square_BS11 / (heads * width * self.axis.size) + self.eps).rsqrt()
        normed_BSHC = here_BSHC * scale_BS11 * self.weight.to(wide).view(heads, width)
        return rope(normed_BSHC.to(x_BSHC.dtype), position_BS, theta, backend=self.backend)
