"""The experts' feed-forward in plain maths, for the tests."""

import torch

from ..swiglu.reference import swiglu_reference


def expert_mlp_reference(
    rows_RD: torch.Tensor, count_E: torch.Tensor, gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor
) -> torch.Tensor:
    """Each row through its own expert, `down (silu(gate x) * up x)`, by weights gathered row by row."""
    expert_R = torch.repeat_interleave(torch.arange(count_E.numel(), device=count_E.device), count_E)
    hidden_RG = torch.einsum("rd,rgd->rg", rows_RD, gate_up_EGD[expert_R])
    return torch.einsum("rf,rdf->rd", swiglu_reference(hidden_RG), down_EDF[expert_R])
