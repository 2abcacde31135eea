"""A linear map in plain maths, for the tests."""

import torch


def linear_reference(x: torch.Tensor, weight_ND: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` over the last dimension."""
    return torch.einsum("...d,nd->...n", x, weight_ND)
