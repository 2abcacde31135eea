"""What one process holds of a run's state: runs of elements of whole canonical tensors.

ZeRO cuts a rank's parameters, laid end to end, into intervals; so a rank's part of a canonical tensor is a box (its
tensor-parallel shard), and of the box, flattened, a run.
"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements `begin` to `end` of a flattened box: rows `start` to `stop` of dimension `dim` of a whole tensor."""

    name: str  # canonical; of an optimizer's tensor `<canonical>.exp_avg`, `.exp_avg_sq` or `.step`
    shape: tuple[int, ...]  # of the whole tensor; () for a step
    dim: int | None  # None: the box is the whole tensor
    start: int
    stop: int
    begin: int
    end: int
    tensor: Tensor  # `[end - begin]`, contiguous: the memory itself, not a copy

    @property
    def box(self) -> tuple[slice, ...]:
        """The box, as an index into the whole tensor."""
        return tuple(
            slice(self.start, self.stop) if dim == self.dim else slice(0, size) for dim, size in enumerate(self.shape)
        )

    @property
    def box_shape(self) -> tuple[int, ...]:
        """Shape of the box."""
        return tuple(self.stop - self.start if dim == self.dim else size for dim, size in enumerate(self.shape))

    @property
    def box_size(self) -> int:
        """Elements of the box."""
        return math.prod(self.box_shape)


@dataclass(frozen=True, kw_only=True)
class HeldState:
    """What this process holds. Over all processes every element of the state appears exactly once."""

    model: tuple[Piece, ...]  # fp32 masters, and buffers as they are
    optimizer: tuple[Piece, ...]
