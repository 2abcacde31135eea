"""What a training run is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from ..moe.config import ModelConfig
from ..moe.data.sampling import Phase
from ..moe.parsing import from_mapping, to_mapping
from ..parallel.config import ParallelConfig
from ..parallel.engine import OptimizerConfig
from .guard import GuardConfig
from .kernel_choice import Kernels
from .schedule import ScheduleConfig

# What says where, on how many ranks and how long a session runs, not what it computes.
_LOCAL = frozenset("out dataset stop_at device threads kernels logger save guard evaluate parallel micro_batch".split())
# What a run may change when it goes on; everything else would make it another run.
_FREE = _LOCAL | {"steps", "schedule"}
# Not in a checkpoint, which holds what came of it: a path, and equal states have equal bytes.
_UNSAVED = _LOCAL | {"initial"}
# Of one forward pass; beyond it nothing but a slip of the pen.
_MOST_TOKENS = 1 << 28


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A stretch of steps with its own domain weights and trained parameters."""

    until: int | None = None  # the step it ends before; null: the end of the run
    weights: Mapping[str, float] | None = None  # by domain; null: all domains alike
    train: tuple[str, ...] = ("*",)  # patterns of canonical parameter names (* matches anything)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out evaluation of every domain."""

    every: int = 0  # steps; 0: only before and after
    tokens: int = 32_768  # a domain, at the most

    def __post_init__(self) -> None:
        if self.every < 0 or self.tokens < 1:
            raise ValueError(f"every must be at least 0 and tokens at least 1, got {self.every} and {self.tokens}")


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Checkpoints."""

    every: int = 500  # steps; 0: only at the end
    keep: int | None = 3  # the newest so many; null: all
    background: bool = True  # write in mid-run beside training, from a copy of the state in host memory

    def __post_init__(self) -> None:
        if self.every < 0 or (self.keep is not None and self.keep < 1):
            raise ValueError(f"every must be at least 0, keep at least 1 (or null), got {self.every} and {self.keep}")

    @property
    def beside_training(self) -> bool:
        """Whether there are saves in mid-run that go on beside training."""
        return self.background and self.every > 0


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Metrics."""

    every: int = 10  # steps
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, whole. Validates itself; `load` builds it from plain data."""

    out: str
    dataset: str
    initial: str | None = None  # a model whose weights a fresh run begins with
    model: ModelConfig
    optim: OptimizerConfig
    schedule: ScheduleConfig
    phases: tuple[PhaseConfig, ...] = (PhaseConfig(),)
    evaluate: EvaluateConfig = EvaluateConfig()
    save: SaveConfig = SaveConfig()
    guard: GuardConfig = field(default_factory=GuardConfig)
    logger: LoggerConfig = LoggerConfig()
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    steps: int
    stop_at: int | None = None
    global_batch: int
    micro_batch: int | None = None  # sequences of one forward pass; null: a data-parallel rank's share
    sequence_length: int
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    kernels: Kernels = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("stop_at", "threads", "micro_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (or null), got {getattr(self, name)}")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {self.sequence_length}")
        if self.global_batch % self.micro_size():
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_size()}: change one"
            )
        if self.schedule.name == "wsd" and self.schedule.warmup_steps + self.schedule.decay_steps > self.steps:
            raise ValueError(
                f"schedule: warmup_steps {self.schedule.warmup_steps} and decay_steps {self.schedule.decay_steps} "
                f"do not fit into {self.steps} steps"
            )
        if self.micro_size() * self.sequence_length > _MOST_TOKENS or self.global_batch > _MOST_TOKENS:
            raise ValueError(
                f"{self.micro_size()} sequences of {self.sequence_length} tokens do not fit into one forward pass: "
                "lower micro_batch, global_batch or sequence_length"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2^63), got {self.seed}")
        if self.guard.rollback:
            self._check_rollback()
        ends = [phase.until for phase in self.phases]
        if not ends or ends[-1] is not None or None in ends[:-1]:
            raise ValueError("phases: every phase but the last needs until, the last has until: null")
        bounds = [0, *(end for end in ends if end is not None), self.steps]
        if any(late <= early for early, late in pairwise(bounds)):
            raise ValueError(f"phases must end in ascending order before step {self.steps}, got until {ends[:-1]}")

    def _check_rollback(self) -> None:
        """Raise ValueError where no checkpoint from before a streak of bad steps would be left."""
        every, keep, patience = self.save.every, self.save.keep, self.guard.patience
        if not every:
            raise ValueError("guard.rollback=true goes back to a checkpoint of mid-run: set save.every, now 0")
        fewest = 1 + -(-(patience - 1) // every)  # one, and those made during the streak
        if keep is not None and keep < fewest:
            raise ValueError(
                f"guard.rollback=true needs a checkpoint that is older than guard.patience={patience} steps: set "
                f"save.keep to at least {fewest} (or null), got {keep}, or raise save.every"
            )

    @staticmethod
    def load(data: Mapping[str, Any]) -> "TrainConfig":
        """Build from composed data, where the router stands beside the model, or from what `to_dict` gave."""
        values = dict(data)
        if "router" in values and isinstance(values.get("model"), Mapping):
            values["model"] = {**values["model"], "router": values.pop("router")}
        try:
            return from_mapping(TrainConfig, values)
        except ValueError as error:
            # The router is a group of its own for the user, though it is a part of the model.
            raise ValueError(str(error).replace("model.router", "router")) from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return to_mapping(self)

    def to_shared_dict(self) -> dict[str, Any]:
        """Return plain data without what may differ between a run's sessions: equal states have equal bytes."""
        return {key: value for key, value in self.to_dict().items() if key not in _UNSAVED}

    def micro_size(self, dp: int = 1) -> int:
        """Sequences of one forward pass of each of `dp` data-parallel ranks."""
        return self.micro_batch if self.micro_batch is not None else max(self.global_batch // dp, 1)

    @property
    def last_step(self) -> int:
        """The step that this session ends after."""
        return min(self.steps, self.stop_at or self.steps)

    def sample_phases(self, domains: tuple[str, ...]) -> tuple[Phase, ...]:
        """Return the phases in samples."""
        phases, start = [], 0
        for phase in self.phases:
            end = None if phase.until is None else phase.until * self.global_batch
            weights = phase.weights if phase.weights is not None else dict.fromkeys(domains, 1.0)
            phases.append(Phase(start=start, end=end, weights=dict(weights)))
            start = end if end is not None else start
        return tuple(phases)

    def phase_at(self, step: int) -> int:
        """Return the index of the phase that step `step` belongs to."""
        return next(i for i, phase in enumerate(self.phases) if phase.until is None or step < phase.until)


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> None:
    """Raise ValueError naming the first key in which a resumed run's config differs from the one it began with."""
    for key in [*before, *(key for key in now if key not in before)]:
        name = f"{path}.{key}" if path else key
        if name in _FREE:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            check_same_run(old, new, name)
        elif old != new:
            raise ValueError(
                f"{name} was {old!r} when this run began and is {new!r} now: set it back, or give another out="
            )
