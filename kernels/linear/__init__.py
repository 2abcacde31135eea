"""Linear maps, and the matrix product that other operations share."""

from .forward import linear_forward, packed
from .op import linear
from .product import padded, padded_size, product

__all__ = ["linear", "linear_forward", "packed", "padded", "padded_size", "product"]
