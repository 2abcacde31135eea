"""Products of rows grouped by expert in plain maths, for the tests."""

import torch


def grouped_linear_reference(rows_RD: torch.Tensor, count_E: torch.Tensor, weight_END: torch.Tensor) -> torch.Tensor:
    """Each row times its own expert's weight, gathered row by row."""
    expert_R = torch.repeat_interleave(torch.arange(count_E.numel(), device=count_E.device), count_E)
    return torch.einsum("rd,rnd->rn", rows_RD, weight_END[expert_R])
