"""Rotary position embedding, with an optional norm of queries and keys before it."""

from .op import rope, rotate, rotation

__all__ = ["rope", "rotate", "rotation"]
