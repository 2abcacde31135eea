"""Output head and cross-entropy in one operation."""

from .op import chunk_size, linear_cross_entropy, reduced_elements
from .sharded import ColumnShard

__all__ = ["ColumnShard", "chunk_size", "linear_cross_entropy", "reduced_elements"]
