"""Tokens to expert-sorted rows and back in plain maths, for the tests."""

import torch

from ..positions import Positions


def permute_reference(x_TD: torch.Tensor, positions: Positions, top_k: int) -> torch.Tensor:
    """Row r is the token of pair source_R[r]."""
    return x_TD[positions.source_R // top_k]


def combine_reference(rows_RD: torch.Tensor, weight_TK: torch.Tensor, positions: Positions) -> torch.Tensor:
    """Token t is the weighted sum of its pairs' rows; a dropped pair adds nothing."""
    T, K = weight_TK.shape
    out_TD = rows_RD.new_zeros(T, rows_RD.shape[-1])
    for k in range(K):
        kept = positions.row_TK[:, k] >= 0
        update = rows_RD[positions.row_TK[kept, k]] * weight_TK[kept, k, None]
        out_TD = out_TD.index_add(0, kept.nonzero().flatten(), update)
    return out_TD
