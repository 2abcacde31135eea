"""A linear map for inference: no autograd, and weights that may be kept in the order in which oneDNN reads them.

Shape letters: D input width, N output width, T tokens.
"""

import torch

from .product import padded, product, uses_onednn

# Up to here products run unpadded: there are few such sizes to compile code for, and one row is a sixteenth of 16.
_FEW = 16
_ROWS = 8  # oneDNN chooses the order for so many; it suits all others, but 1 would suit 1 alone


def linear_forward(x_TD: torch.Tensor, weight_ND: torch.Tensor) -> torch.Tensor:
    """`x_TD @ weight_ND.T`, a new tensor [T, N]; the weight as it is or as `packed` makes it.

    The bits depend on T, not on where a weight lies: those of one expert are the same in a stack of fewer.
    """
    if x_TD.shape[0] <= _FEW:
        return product(x_TD, weight_ND)
    return product(padded(x_TD), weight_ND)[: x_TD.shape[0]]


def packed(weight_ND: torch.Tensor) -> torch.Tensor:
    """The weight in oneDNN's own order where products run there, else itself: good for `linear_forward` alone.

    Products of few rows then read it twice as fast (1024 x 256, Zen 5: 38 us instead of 62 with one row, 41 instead of
    85 with two).
    """
    if not uses_onednn(weight_ND) or not weight_ND.numel():
        return weight_ND
    reordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_ND.detach(), _ROWS)
    return reordered
