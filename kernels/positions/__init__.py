"""Where each routed token goes: the expert-sorted row order."""

from .op import positions
from .reference import Positions

__all__ = ["Positions", "positions"]
