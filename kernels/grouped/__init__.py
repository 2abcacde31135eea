"""Products of rows grouped by expert with the experts' weights: what the experts' feed-forward is made of."""

from .op import grouped_linear

__all__ = ["grouped_linear"]
