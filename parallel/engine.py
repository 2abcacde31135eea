"""The engine's contract: what a trainer may ask of whatever owns parameters, gradients and moments."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..moe.storage.tensors import NamedTensor


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019). One-dimensional parameters are never decayed."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0  # gradients are scaled down to this global norm; None: never

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.eps <= 0 or self.weight_decay < 0:
            raise ValueError("lr and eps must be above 0, weight_decay not negative")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 and beta2 must lie in [0, 1), got {self.beta1} and {self.beta2}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0 (or null for none), got {self.clip_norm}")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an optimizer step did: the gradient's norm before clipping, and whether the step was skipped."""

    grad_norm: float
    skipped: bool


@dataclass(frozen=True, kw_only=True)
class NamedState:
    """Everything an engine owns, under canonical names: fp32 masters and buffers, and the optimizer's tensors."""

    model: Mapping[str, NamedTensor]
    optimizer: Mapping[str, NamedTensor]


class TensorSource(Protocol):
    """Where a state is read from, one tensor at a time."""

    def names(self) -> Iterable[str]:
        """Return the names it holds."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        ...

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        ...

    def read_slice(self, name: str, slices: Sequence[slice]) -> Tensor:
        """Return `tensor[slices]`, contiguous; dimensions without a slice are whole."""
        ...


class TrainEngine(Protocol):
    """Owns the parameters: accumulates gradients, steps, and gives and takes named state."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's `loss`, already divided by the global batch's labels."""
        ...

    def step(self, lr: float) -> StepResult:
        """Clip, update, forget the gradients. Nothing changes where loss or norm is not finite."""
        ...

    def train_only(self, trains: Callable[[str], bool]) -> None:
        """From now on update only parameters whose canonical name `trains` accepts."""
        ...

    def named_state(self) -> NamedState:
        """Return everything owned, read lazily."""
        ...

    def load_named_state(self, model: TensorSource, optimizer: TensorSource | None) -> None:
        """Take everything over, exactly; raise ValueError naming what is missing, left over or of another shape."""
        ...
