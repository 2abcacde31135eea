"""Softmax top-k gate, and the gate of fixed routes."""

from .op import choose, gate
from .reference import Gate
from .table import table_gate

__all__ = ["Gate", "choose", "gate", "table_gate"]
