"""Softmax top-k gate."""

from .op import choose, gate
from .reference import Gate

__all__ = ["Gate", "choose", "gate"]
