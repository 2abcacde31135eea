"""The experts of a sparse layer, and the feed-forward of a dense one.

Shape letters: D model width, F hidden width, E experts, R rows, T tokens, K top-k.
"""

import torch
from torch import Tensor, nn

from ..kernels.expert_mlp import expert_mlp, expert_mlp_few
from ..kernels.linear import linear, linear_few
from ..kernels.swiglu import swiglu, swiglu_forward


class GroupedExperts(nn.Module):
    """SwiGLU experts with stacked weights: `gate_up` [E, 2F, D] (gate rows first) and `down` [E, D, F]."""

    def __init__(self, num_experts: int, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, expert_dim))

    def forward(self, rows_RD: Tensor, count_E: Tensor) -> Tensor:
        """Apply expert e to its `count_E[e]` rows; rows are grouped by expert in order."""
        return expert_mlp(rows_RD, count_E, self.gate_up, self.down)

    def decode(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return each token's weighted sum over its experts, for a few tokens; no autograd."""
        return expert_mlp_few(x_TD, expert_TK, weight_TK, self.gate_up, self.down)


class DenseFFN(nn.Module):
    """SwiGLU feed-forward: `gate_up` [2F, D] (gate rows first) and `down` [D, F]."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * ffn_dim, dim))
        self.down = nn.Parameter(torch.empty(dim, ffn_dim))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Apply the feed-forward to every token."""
        return linear(swiglu(linear(x_BSD, self.gate_up)), self.down)

    def decode(self, x_BSD: Tensor) -> Tensor:
        """Apply the feed-forward to a few tokens; no autograd."""
        hidden_TG = linear_few(x_BSD.flatten(0, 1), self.gate_up)
        return linear_few(swiglu_forward(hidden_TG), self.down).view_as(x_BSD)
