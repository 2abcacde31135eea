"""The gradient of the head's weight, grown chunk by chunk.

Shape letters: N tokens of a chunk, D model width, V vocabulary.
"""

import torch

from ..linear import product

_BLOCK_ELEMENTS = 1 << 22


class WeightGradient:
    """The sum over `num_chunks` chunks of `grad_NV.T @ x_ND`: in fp32 at least, where there are several."""

    def __init__(self, weight_VD: torch.Tensor, num_chunks: int) -> None:
        self.dtype = weight_VD.dtype
        wide = self.dtype if num_chunks == 1 else torch.promote_types(self.dtype, torch.float32)
        # On a CPU grown transposed: the small chunk of x then is the operand that the product copies.
        shape = weight_VD.shape if weight_VD.is_cuda else weight_VD.shape[::-1]
        self.sum = torch.zeros(shape, dtype=wide, device=weight_VD.device)

    def add(self, x_ND: torch.Tensor, grad_NV: torch.Tensor) -> None:
        """Add a chunk's."""
        if not self.sum.is_cuda:
            self._add_in_blocks(x_ND, grad_NV)
        elif self.sum.dtype == grad_NV.dtype:
            self.sum.addmm_(grad_NV.t(), x_ND)
        else:
            # The product's own fp32 sum goes on from the last chunk's: nothing is rounded, nothing else is allocated.
            torch.addmm(self.sum, grad_NV.t(), x_ND, out_dtype=self.sum.dtype, out=self.sum)

    def total(self) -> torch.Tensor:
        """Return the gradient [V, D] in the weight's dtype."""
        return (self.sum if self.sum.is_cuda else self.sum.t()).to(self.dtype).contiguous()

    def _add_in_blocks(self, x_ND: torch.Tensor, grad_NV: torch.Tensor) -> None:
        """Multiply some of x's columns at a time: from 32 MB on glibc gives a product new pages, at half the speed."""
        size = max(64, _BLOCK_ELEMENTS // max(grad_NV.shape[1], 1))
        for begin in range(0, x_ND.shape[1], size):
            block = slice(begin, begin + size)
            self.sum[block] += product(x_ND[:, block].t(), grad_NV.t())
