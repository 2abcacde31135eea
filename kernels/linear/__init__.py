"""Linear maps, and the matrix product that other operations share."""

from .op import linear
from .product import padded_rows, product

__all__ = ["linear", "padded_rows", "product"]
