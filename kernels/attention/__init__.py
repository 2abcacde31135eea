"""Causal grouped-query attention over packed documents, and over kept keys and values."""

from .cached import cached_attention, cached_bias
from .op import attention

__all__ = ["attention", "cached_attention", "cached_bias"]
