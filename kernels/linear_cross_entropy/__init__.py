"""Output head and cross-entropy in one operation."""

from .op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
