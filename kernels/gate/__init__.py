"""Softmax top-k gate."""

from .op import gate
from .reference import Gate

__all__ = ["Gate", "gate"]
