"""Linear maps, and the matrix product that other operations share."""

from .few import linear_few
from .op import linear
from .product import padded, padded_size, product

__all__ = ["linear", "linear_few", "padded", "padded_size", "product"]
