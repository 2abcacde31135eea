"""Causal grouped-query attention over packed documents."""

from .op import attention

__all__ = ["attention"]
