"""How a model is spread over processes: a frozen config that validates itself."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the axes and what is traded for memory. Data parallelism takes the processes that are left."""

    tp: int = 1  # tensor parallelism of attention, dense layers, embedding and head
    ep: int = 1  # expert parallelism: the experts of a sparse layer are spread over so many processes
    etp: int | None = None  # tensor parallelism inside an expert: tp or 1; None: tp
    zero_stage: int = 1  # DeepSpeed ZeRO: 1 or 2
    offload: Literal["none", "cpu"] = "none"  # where the optimizer's state lives
    recompute: Literal["none", "layer", "experts", "attention"] = "none"  # what the backward computes again
    # Seconds until all have come together: nodes of a job start some seconds apart, a slow file system adds a minute;
    # a node that takes longer than two is not coming.
    join_timeout: int = 120
    timeout: int = 600  # seconds that a process waits for another
    watchdog: int | None = (
        None  # seconds in which no process moves, until all are ended; None: half of timeout; 0: never
    )

    def __post_init__(self) -> None:
        for name in ("tp", "ep", "join_timeout", "timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.watch_seconds < self.timeout:
            raise ValueError(
                f"parallel.watchdog must be below parallel.timeout ({self.timeout}), at which all give up without a "
                f"word on who hangs where, or null (half of it), or 0 (never); got {self.watchdog}"
            )
        if self.etp not in (None, 1, self.tp):
            allowed = "1" if self.tp == 1 else f"1 or tp ({self.tp})"
            raise ValueError(f"parallel.etp must be {allowed}, got {self.etp}")
        if self.zero_stage not in (1, 2):
            # 0.19.8 asserts so in _validate_zero3_moe_compatibility. With experts withheld it would still gather
            # parameters, and sum gradients, as a batch reaches them: ranks whose domains differ would not meet.
            why = "DeepSpeed's stage 3 takes experts that are spread over ranks in its own AutoEP layer alone"
            raise ValueError(f"parallel.zero_stage must be 1 or 2, got {self.zero_stage}: {why}")
        for name, allowed_values in _CHOICES.items():
            if getattr(self, name) not in allowed_values:
                choices = ", ".join(map(str, allowed_values))
                raise ValueError(f"parallel.{name} must be one of {choices}, got {getattr(self, name)!r}")

    @property
    def watch_seconds(self) -> float:
        """How long no process may move; 0: as long as it likes."""
        return self.timeout / 2 if self.watchdog is None else self.watchdog

    @property
    def expert_tp(self) -> int:
        """Processes that share one expert."""
        return self.tp if self.etp is None else self.etp


_CHOICES: dict[str, tuple[object, ...]] = {
    "offload": ("none", "cpu"),
    "recompute": ("none", "layer", "experts", "attention"),
}
