"""Linear maps, and the matrix product that other operations share."""

from .op import linear
from .product import padded, padded_size, product

__all__ = ["linear", "padded", "padded_size", "product"]
