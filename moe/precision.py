"""The precision of what is never rounded: the routers, masters and their moments, sums of gradients."""

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for narrower dtypes; fp64 stays fp64."""
    return torch.promote_types(dtype, torch.float32)


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether parameters of this dtype need wider masters and sums beside them."""
    return dtype != wide_dtype(dtype)
