"""The step guard: sees losses that spike and steps that are skipped, and says when to go back or to end.

What it decides is a pure function of the losses, which all ranks agree on, so neither ranks nor resumption change it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a step is bad, and what follows from several bad ones in a row."""

    max_skipped: int = 20  # skipped steps in a row (loss or gradient not finite) that end the run; 0: never
    window: int = 128  # losses that a new one is compared with; at least 8
    spike: float = 6.0  # a spike lies more than so many standard deviations above their mean; 0: none does
    patience: int = 10  # bad steps in a row that are no accident
    rollback: bool = False  # after those go back, once, to the newest checkpoint before them, and past their data

    def __post_init__(self) -> None:
        for name, least in (("max_skipped", 0), ("window", 8), ("spike", 0), ("patience", 1)):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= least):
                raise ValueError(f"guard.{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a step means for the run."""

    deviations: float | None  # of a spike, above the mean; None where it is none
    lasts: bool  # so many bad steps in a row are no accident
    end: bool  # too many skipped ones in a row


class StepGuard:
    """Watches one run's steps. Its state goes into the checkpoint.

    A spike is found as OLMo's trainer does (arXiv 2501.00656; OLMo-core's SkipStepOptimizer: 6 standard deviations over
    128 steps). Here it is not skipped, and not let into the window either: one that lasts must not hide itself.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: list[float] = []  # of steps that were not bad, the oldest first
        self.phase = 0  # of training, whose losses they are
        self.skipped = self.bad = 0  # steps in a row: skipped; skipped or spiking
        self.rolled_back: tuple[int, int] | None = None  # from the checkpoint of a step to the end of a step

    def observe(self, loss: float, *, skipped: bool, phase: int) -> Verdict:
        """Take in a finished step: its loss (nats a token; any number where it was skipped), and its phase."""
        if phase != self.phase:  # other data, another level
            self.phase, self.losses = phase, []
        deviations = None if skipped else self._deviations(loss)
        self.skipped = self.skipped + 1 if skipped else 0
        self.bad = self.bad + 1 if skipped or deviations is not None else 0
        if not self.bad:
            self.losses = [*self.losses, loss][-self.config.window :]
        return Verdict(
            deviations=deviations,
            lasts=self.bad >= self.config.patience,
            end=0 < self.config.max_skipped <= self.skipped,
        )

    @property
    def may_go_back(self) -> bool:
        """Whether the run may, and has not yet."""
        return self.config.rollback and self.rolled_back is None

    def settle(self) -> None:
        """Take the level of the steps to come for the usual one."""
        self.losses, self.bad = [], 0

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {
            "losses": self.losses,
            "phase": self.phase,
            "skipped": self.skipped,
            "bad": self.bad,
            "rolled_back": self.rolled_back,
        }

    def load_json(self, data: Mapping[str, Any]) -> None:
        """Take over what `to_json` gave. Raises KeyError where something lacks, TypeError where it does not fit."""
        self.losses = [float(loss) for loss in data["losses"]][-self.config.window :]
        self.phase, self.skipped, self.bad = int(data["phase"]), int(data["skipped"]), int(data["bad"])
        span = data["rolled_back"]
        self.rolled_back = None if span is None else (int(span[0]), int(span[1]))

    def _deviations(self, loss: float) -> float | None:
        """Return by how many standard deviations `loss` lies above the mean, where that makes it a spike."""
        if self.config.spike == 0 or len(self.losses) < self.config.window // 2:
            return None
        N = len(self.losses)
        mean = math.fsum(self.losses) / N
        deviation = math.sqrt(math.fsum((other - mean) ** 2 for other in self.losses) / (N - 1))
        above = loss - mean
        if above <= self.config.spike * deviation:
            return None
        return above / deviation if deviation else math.inf
