"""Output head and cross-entropy in one operation."""

from .op import linear_cross_entropy, reduced_elements
from .sharded import ColumnShard

__all__ = ["ColumnShard", "linear_cross_entropy", "reduced_elements"]
