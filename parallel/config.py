"""How a model is spread over processes: a frozen config that validates itself."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the axes and what is traded for memory. Data parallelism takes the processes that are left."""

    tp: int = 1  # tensor parallelism of attention, dense layers, embedding and head
    ep: int = 1  # expert parallelism: the experts of a sparse layer are spread over so many processes
    etp: int | None = None  # tensor parallelism inside an expert: tp or 1; None: tp
    zero_stage: Literal[1, 2, 3] = 1  # DeepSpeed ZeRO
    offload: Literal["none", "cpu"] = "none"  # where the optimizer's state lives
    recompute: Literal["none", "layer", "experts", "attention"] = "none"  # what the backward computes again
    timeout: int = 600  # seconds that a process waits for another

    def __post_init__(self) -> None:
        for name in ("tp", "ep", "timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        if self.etp not in (None, 1, self.tp):
            allowed = "1" if self.tp == 1 else f"1 or tp ({self.tp})"
            raise ValueError(f"parallel.etp must be {allowed}, got {self.etp}")
        for name, allowed_values in _CHOICES.items():
            if getattr(self, name) not in allowed_values:
                choices = ", ".join(map(str, allowed_values))
                raise ValueError(f"parallel.{name} must be one of {choices}, got {getattr(self, name)!r}")

    @property
    def expert_tp(self) -> int:
        """Processes that share one expert."""
        return self.tp if self.etp is None else self.etp


_CHOICES: dict[str, tuple[object, ...]] = {
    "zero_stage": (1, 2, 3),
    "offload": ("none", "cpu"),
    "recompute": ("none", "layer", "experts", "attention"),
}
