"""The expert layer of each contender, on the same tokens, weights and routes.

Shape letters: T tokens, K top-k, R rows (T*K), D model width, F expert hidden width, E experts.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels.backend import Backend
from ..kernels.expert_mlp import moe_mlp
from ..kernels.grouped import grouped_linear
from ..kernels.grouped.op import BLOCK_ROWS
from ..kernels.linear import linear
from ..kernels.permute import combine, permute
from ..kernels.positions import positions
from ..kernels.swiglu import swiglu

Load = Literal["uniform", "zipf", "hot", "empty"]


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """What one pass computes."""

    tokens: int
    dim: int
    expert_dim: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if 2 * self.top_k > self.experts:
            raise ValueError(f"top_k must be at most half the experts ({self.experts}), got {self.top_k}")

    @property
    def forward_flops(self) -> int:
        """Of the products of one forward; a backward has twice as many."""
        return 6 * self.tokens * self.top_k * self.dim * self.expert_dim

    def pass_elements(self, load: Load) -> int:
        """Return how many numbers a forward and a backward must read and write, 6TD + 4RD + 14RF + 9DF an expert.

        That of tokens and rows, twice; of the hidden rows, their gradients and the activation; of the weights, twice,
        and their gradients, of experts that have rows.
        """
        T, D, F, R = self.tokens, self.dim, self.expert_dim, self.tokens * self.top_k
        busy = int(self.count(load).count_nonzero())
        return 6 * T * D + 4 * R * D + 14 * R * F + 9 * busy * D * F

    def tile_efficiency(self, load: Load) -> float:
        """Return how much of the blocks of Triton's products on a GPU is rows: each expert's last block is padded."""
        blocks_E = -(-self.count(load) // BLOCK_ROWS)
        return self.tokens * self.top_k / (int(blocks_E.sum()) * BLOCK_ROWS)

    def count(self, load: Load) -> Tensor:
        """Return the rows of each expert, int64 [E]."""
        return torch.bincount(self.route(load).flatten(), minlength=self.experts)

    def route(self, load: Load) -> Tensor:
        """Return experts drawn without repetition, int64 [T, K].

        uniform; zipf: expert e as often as 1 / (e + 1); hot: the first one by every token; empty: a half by none.
        """
        share_E = torch.ones(self.experts)
        match load:
            case "zipf":
                share_E = 1 / torch.arange(1, self.experts + 1)
            case "hot":
                share_E[0] = 1e6
            case "empty":
                share_E[self.experts // 2 :] = 0
        generator = torch.Generator().manual_seed(0)
        return torch.multinomial(share_E.expand(self.tokens, -1), self.top_k, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every contender is given; all but the routes want gradients."""

    x_TD: Tensor
    expert_TK: Tensor
    weight_TK: Tensor  # fp32
    gate_up_EGD: Tensor  # [E, 2F, D]
    down_EDF: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Those that want gradients."""
        return self.x_TD, self.weight_TK, self.gate_up_EGD, self.down_EDF


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A contender's forward, and what its backward is taken with respect to."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]  # the last two are weights


def draw(shape: MoeShape, load: Load, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return random inputs, the same in every process on this device."""
    generator = torch.Generator(device).manual_seed(0)
    T, D, F, E, K = shape.tokens, shape.dim, shape.expert_dim, shape.experts, shape.top_k

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype).mul_(scale).requires_grad_()

    return Inputs(
        x_TD=normal(T, D),
        expert_TK=shape.route(load).to(device),
        weight_TK=normal(T, K).detach().float().softmax(-1).requires_grad_(),
        gate_up_EGD=normal(E, 2 * F, D, scale=D**-0.5),
        down_EDF=normal(E, D, F, scale=F**-0.5),
    )


def build_layer(contender: str, inputs: Inputs) -> Layer:
    """Return the layer of `contender`: sigmoe, grouped_linear (ours in parts), dense (one expert for all rows), a peer.

    The peers are in `moe_peers.py`.
    """
    match contender:
        case "sigmoe":
            return Layer(forward=lambda: _sigmoe(inputs), leaves=inputs.leaves)
        case "grouped_linear":
            return Layer(forward=lambda: _in_parts(inputs), leaves=inputs.leaves)
        case "dense":
            return _dense(inputs)
    forward = importlib.import_module("..moe_peers", __name__).peer(contender, inputs)
    return Layer(forward=forward, leaves=inputs.leaves)


def _sigmoe(inputs: Inputs) -> Tensor:
    backend = _backend(inputs)
    where = positions(inputs.expert_TK[None], inputs.gate_up_EGD.shape[0], backend=backend)
    return moe_mlp(inputs.x_TD, inputs.weight_TK, where, inputs.gate_up_EGD, inputs.down_EDF, backend=backend)


def _in_parts(inputs: Inputs) -> Tensor:
    """The same by the operations on sorted rows: permute, two grouped products with SwiGLU between them, combine."""
    backend = _backend(inputs)
    where = positions(inputs.expert_TK[None], inputs.gate_up_EGD.shape[0], backend=backend)
    rows_RD = permute(inputs.x_TD, where, inputs.expert_TK.shape[1], backend=backend)
    act_RF = swiglu(grouped_linear(rows_RD, where.count_E, inputs.gate_up_EGD, backend=backend))
    rows_RD = grouped_linear(act_RF, where.count_E, inputs.down_EDF, backend=backend)
    return combine(rows_RD, inputs.weight_TK, where, backend=backend)


def _backend(inputs: Inputs) -> Backend:
    return "triton" if inputs.x_TD.device.type == "cuda" else "torch"


def _dense(inputs: Inputs) -> Layer:
    """All rows through the first expert: no routing, the products of equal flops alone."""
    rows_RD = inputs.x_TD.detach().repeat_interleave(inputs.expert_TK.shape[1], 0).requires_grad_()
    gate_up, down = (weights[0].detach().requires_grad_() for weights in (inputs.gate_up_EGD, inputs.down_EDF))
    return Layer(forward=lambda: linear(swiglu(linear(rows_RD, gate_up)), down), leaves=(rows_RD, gate_up, down))
