"""What `sigmoe prune` is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..moe.parsing import from_mapping
from ..moe.prune.budget import Budget, parse_budget
from ..moe.prune.criteria import CRITERIA, DATA_CRITERIA
from .file_bytes import DEFAULT_FILE_BYTES, parse_file_bytes


@dataclass(frozen=True, kw_only=True)
class PruneCommand:
    """The keys of `sigmoe prune`; `total` is its `global`."""

    model: str | None = None
    out: str
    criterion: str = "reap"
    keep: float | None = None
    experts: int | tuple[int, ...] | None = None
    total: int | float | None = None
    bytes: int | str | None = None
    data: str | None = None
    domain: str | tuple[str, ...] | None = None
    tokens: int = 131_072
    stats: str | None = None
    evaluate: int = 0
    merge: bool = False
    heal: int = 0
    heal_lr: float = 3e-4
    format: Literal["auto", "sigmoe"] = "auto"
    file_bytes: int | str = DEFAULT_FILE_BYTES
    check: bool = True
    verify: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.model is None:
            raise ValueError("missing key model: give model=... (sigmoe prune --help)")
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}")
        for key, least in (("tokens", 1), ("threads", 1), ("evaluate", 0), ("heal", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"{key} must be at least {least}, got {value}")
        if not 0 < self.heal_lr < float("inf"):
            raise ValueError(f"heal_lr must be a finite number above 0, got {self.heal_lr:g}")
        if self.heal and self.data is None:
            raise ValueError("heal trains on the calibration text: give data=, or heal=0")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2^63), got {self.seed}")
        if self.needs_sums and self.data is None and self.stats is None:
            reason = "merge=true" if self.criterion not in DATA_CRITERIA else f"criterion={self.criterion}"
            raise ValueError(f"{reason} needs calibration text: give data=, or stats= of an earlier calibration")
        if self.domain is not None and self.data is None:
            raise ValueError("domain names what is taken of data=: give data=, or leave domain out")
        self.budget, self.max_file_bytes  # noqa: B018 - they validate themselves

    @property
    def given(self) -> str:
        """The model that is pruned."""
        assert self.model is not None
        return self.model

    @property
    def needs_sums(self) -> bool:
        """Whether it takes calibration to say which experts stay, or what becomes of the others."""
        return self.criterion in DATA_CRITERIA or self.merge

    @property
    def budget(self) -> Budget:
        """How many experts stay."""
        keys = {"keep": self.keep, "experts": self.experts, "global": self.total, "bytes": self.bytes}
        return parse_budget(keys)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains whose text is taken; none named: all."""
        return (self.domain,) if isinstance(self.domain, str) else (self.domain or ())

    @property
    def max_file_bytes(self) -> int:
        """The most that a weight file holds."""
        return parse_file_bytes(self.file_bytes)

    def settings(self) -> dict[str, Any]:
        """Return what of the keys decides the result, apart from model and calibration, as plain JSON data."""
        budget = self.budget
        experts = list(budget.experts) if isinstance(budget.experts, tuple) else budget.experts
        return {
            "criterion": self.criterion,
            "keep": budget.keep,
            "experts": experts,
            "global": budget.total,
            "bytes": budget.bytes,
            "merge": self.merge,
            "heal": self.heal,
            "heal_lr": self.heal_lr if self.heal else None,
            "format": self.format,
            "file_bytes": self.max_file_bytes,
            "seed": self.seed if self.criterion == "random" else None,
        }


def load(config: Mapping[str, object]) -> PruneCommand:
    """Build the command from composed data. Raises ValueError naming the key."""
    values = dict(config)
    values["total"] = values.pop("global", None)
    return from_mapping(PruneCommand, values)
