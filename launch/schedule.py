"""Learning rate by step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then cosine, or a stable stretch with a decay at the end (wsd), or constant."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd: length of the linear decay at the end
    min_ratio: float = 0.1  # the last step's rate over the peak's

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise ValueError(
                f"warmup_steps and decay_steps must be at least 0, got {min(self.warmup_steps, self.decay_steps)}"
            )
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio must lie in [0, 1], got {self.min_ratio}")
        if self.name == "wsd" and self.decay_steps == 0:
            raise ValueError("schedule wsd needs decay_steps above 0")
        if self.name != "wsd" and self.decay_steps != 0:
            raise ValueError(f"decay_steps is for schedule wsd; {self.name} has none: set it to 0")


def rate_ratio(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return the rate of step `step` (0-based) of `steps` as a share of the peak rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    match config.name:
        case "constant":
            return 1.0
        case "cosine":
            length = max(steps - 1 - config.warmup_steps, 1)
            done = min((step - config.warmup_steps) / length, 1.0)
            return config.min_ratio + (1 - config.min_ratio) * (1 + math.cos(math.pi * done)) / 2
        case "wsd":
            done = max(step + 1 - (steps - config.decay_steps), 0) / config.decay_steps
            return 1 + (config.min_ratio - 1) * min(done, 1.0)
