"""Products of a few rows, as one new token a sequence makes them: no padding, no autograd.

Shape letters: M, N, K as in BLAS.
"""

import torch

from .product import padded, product, uses_onednn

_FEW = 16
_CACHE_LINE = 64  # bytes


def linear_few(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """`x_MK @ weight_NK.T`, a new tensor [M, N], at the speed at which the weight is read where M is small.

    The bits depend on M, not on where a weight lies: those of one expert are the same in a stack of fewer.
    """
    num_rows = x_MK.shape[0]
    if num_rows > _FEW:
        return product(padded(x_MK), weight_NK)[:num_rows]
    # oneDNN takes 20 us to find its code again, which only several rows repay. MKL's bits depend on how a weight's
    # rows are aligned: it is asked only where that is the same in every stack.
    if uses_onednn(x_MK) and (num_rows > 1 or not _aligned(weight_NK)):
        return product(x_MK, weight_NK)
    return torch.mm(x_MK, weight_NK.t())


def _aligned(weight_NK: torch.Tensor) -> bool:
    row_bytes = weight_NK.shape[1] * weight_NK.element_size()
    return row_bytes % _CACHE_LINE == 0 and weight_NK.data_ptr() % _CACHE_LINE == 0
