"""Causal grouped-query attention over packed documents, and over kept keys and values."""

from .cached import Sight, cached_attention
from .op import attention

__all__ = ["Sight", "attention", "cached_attention"]
