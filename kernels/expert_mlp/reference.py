"""The experts' feed-forward in plain maths, for the tests."""

import torch

from ..permute.reference import combine_reference, permute_reference
from ..positions import Positions
from ..swiglu.reference import swiglu_reference


def expert_mlp_reference(
    rows_RD: torch.Tensor, count_E: torch.Tensor, gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor
) -> torch.Tensor:
    """Each row through its own expert, `down (silu(gate x) * up x)`, by weights gathered row by row."""
    expert_R = torch.repeat_interleave(torch.arange(count_E.numel(), device=count_E.device), count_E)
    hidden_RG = torch.einsum("rd,rgd->rg", rows_RD, gate_up_EGD[expert_R])
    return torch.einsum("rf,rdf->rd", swiglu_reference(hidden_RG), down_EDF[expert_R])


def moe_mlp_reference(
    x_TD: torch.Tensor,
    weight_TK: torch.Tensor,
    positions: Positions,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Token t is the weighted sum of what its experts make of it; a dropped pair adds nothing."""
    rows_RD = permute_reference(x_TD, positions, weight_TK.shape[1])
    out_RD = expert_mlp_reference(rows_RD, positions.count_E, gate_up_EGD, down_EDF)
    return combine_reference(out_RD, weight_TK, positions)
