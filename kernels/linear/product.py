"""Matrix products by the faster library at hand, without autograd.

torch hands fp32 products on a CPU to MKL, which on AMD processors leaves AVX-512 idle (torch 2.13 with MKL 2024.2 on
Zen 5: 100 GFLOP/s a core, where oneDNN from the same wheel reaches 220). Plain fp32 reaches oneDNN through one operator
alone, the one that torch's compiler emits for a linear layer.

Shape letters: M, N, K as in BLAS.
"""

import torch


def product(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """`a_MK @ b_NK.T`, a new tensor [M, N] of the inputs' dtype.

    Either may be the transposed view of a contiguous tensor; on a CPU in fp32 such an `a_MK` is copied first, so make
    the smaller one `a_MK` where there is a choice.
    """
    if uses_onednn(a_MK) and a_MK.numel() and b_NK.numel():
        out_MN: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
        return out_MN
    return a_MK @ b_NK.t()


def padded(x_TD: torch.Tensor) -> torch.Tensor:
    """The rows of x_TD and, where products of any number of rows are costly, a few zero rows after them."""
    num_rows = x_TD.shape[0]
    size = padded_size(num_rows, x_TD)
    if size == num_rows:
        return x_TD
    padded_MD = x_TD.new_empty(size, x_TD.shape[1])
    padded_MD[:num_rows] = x_TD
    padded_MD[num_rows:] = 0
    return padded_MD


def padded_size(num_rows: int, like: torch.Tensor) -> int:
    """How many rows `padded` makes of num_rows, for products of `like`'s dtype on its device.

    oneDNN compiles code for each M, N and K that it meets (half a millisecond, half a megabyte) and keeps the last
    thousand. Rounded up to 64 rows, above 1024 to an eighth of a power of two, few sizes are left.
    """
    if not uses_onednn(like):
        return num_rows
    step = 16 if num_rows <= 64 else max(64, 1 << (num_rows.bit_length() - 4))
    return -(-num_rows // step) * step


def uses_onednn(x: torch.Tensor) -> bool:
    """Whether `product` of such tensors is oneDNN's."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
