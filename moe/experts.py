"""The experts of a sparse layer, and the feed-forward of a dense one.

Shape letters: D model width, F hidden width, E experts, R rows, T tokens, K top-k.
"""

import torch
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.expert_mlp import expert_mlp, moe_mlp, routed_mlp
from ..kernels.linear import linear, linear_forward, packed
from ..kernels.swiglu import swiglu, swiglu_forward
from .dispatch import LocalReceipt


class GroupedExperts(nn.Module):
    """SwiGLU experts with stacked weights: `gate_up` [E, 2F, D] (gate rows first) and `down` [E, D, F]."""

    def __init__(self, num_experts: int, dim: int, expert_dim: int, backend: Backend = "torch") -> None:
        super().__init__()
        self.backend = backend
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, expert_dim))

    def forward(self, rows_RD: Tensor, count_E: Tensor, receipt: LocalReceipt | None = None) -> Tensor:
        """Apply expert e to its `count_E[e]` rows; rows are grouped by expert in order.

        With a receipt `rows_RD` are tokens, still in their own order, and so is the answer, their weighted sums.
        """
        if receipt is not None:
            order, weight_TK = receipt.positions, receipt.weight_TK
            return moe_mlp(rows_RD, weight_TK, order, self.gate_up, self.down, backend=self.backend)
        return expert_mlp(rows_RD, count_E, self.gate_up, self.down, backend=self.backend)

    def extend(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return each token's weighted sum over its experts; no autograd."""
        return routed_mlp(x_TD, expert_TK, weight_TK, self.gate_up, self.down)

    def pack(self) -> None:
        """Make the weights good for `extend` alone, and faster there."""
        gate_up, down = (tuple(map(packed, weights)) for weights in (self.gate_up, self.down))
        del self.gate_up, self.down
        self.gate_up, self.down = gate_up, down  # type: ignore[assignment]


class DenseFFN(nn.Module):
    """SwiGLU feed-forward: `gate_up` [2F, D] (gate rows first) and `down` [D, F]."""

    def __init__(self, dim: int, ffn_dim: int, backend: Backend = "torch") -> None:
        super().__init__()
        self.backend = backend
        self.gate_up = nn.Parameter(torch.empty(2 * ffn_dim, dim))
        self.down = nn.Parameter(torch.empty(dim, ffn_dim))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Apply the feed-forward to every token."""
        return linear(swiglu(linear(x_BSD, self.gate_up), backend=self.backend), self.down)

    def extend(self, x_BSD: Tensor) -> Tensor:
        """Apply the feed-forward to every token; no autograd."""
        hidden_TG = linear_forward(x_BSD.flatten(0, 1), self.gate_up)
        return linear_forward(swiglu_forward(hidden_TG), self.down).view_as(x_BSD)

    def pack(self) -> None:
        """Make the weights good for `extend` alone, and faster there."""
        gate_up, down = packed(self.gate_up), packed(self.down)
        del self.gate_up, self.down
        self.gate_up, self.down = gate_up, down  # type: ignore[assignment]
