"""Rotary position embedding, with an optional norm of queries and keys before it."""

from .op import rope

__all__ = ["rope"]
