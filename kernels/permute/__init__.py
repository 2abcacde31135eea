"""Tokens to expert-sorted rows and back."""

from .op import combine, permute

__all__ = ["combine", "permute"]
