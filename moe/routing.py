"""What a router is given and what it answers.

Shape letters: B sequences, S positions, T tokens (B*S), E experts, K top-k, N balance groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TrainingPass:
    """Makes a forward pass a training pass: the key of its random draws, and the previous step's load."""

    seed: int
    step: int
    fractions: Mapping[int, Tensor] = field(default_factory=dict)  # layer -> fp32 [N, E]


@dataclass(frozen=True, kw_only=True)
class DomainGroup:
    """The sequences of one domain in a batch; `rows` is None where that is all of them."""

    domain: int
    rows: Tensor | None  # int64 indices into B

    def of(self, x_BS: Tensor) -> Tensor:
        """Return the group's sequences of `x_BS`."""
        return x_BS if self.rows is None else x_BS[self.rows]


@dataclass(frozen=True, kw_only=True)
class RoutingContext:
    """What routers see besides the activations; the same for every layer of a forward pass."""

    token_BS: Tensor
    groups: tuple[DomainGroup, ...]  # empty where the batch has no domains
    index_T: Tensor  # int64 global token index: sample * S + position
    training: TrainingPass | None


@dataclass(frozen=True, kw_only=True)
class RoutingStats:
    """What one sparse layer counted. Sums are over tokens: divide by the tokens of the global batch."""

    layer: int
    count_BE: Tensor  # int64 selections by sequence and expert, before capacity drops any
    balance_sum: Tensor  # fp32 scalar, differentiable
    z_sum: Tensor  # fp32 scalar, differentiable: sum of logsumexp^2
    dropped: Tensor  # int64 scalar: selections dropped by capacity


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Chosen experts (global ids) and their weights, by sequence."""

    expert_BSK: Tensor  # int64
    weight_BSK: Tensor  # fp32
    count_BE: Tensor  # int64
    balance_sum: Tensor
    z_sum: Tensor
    num_experts: int
    capacity_B: Tensor | None  # int64: the most pairs of a sequence that an expert takes; None: dropless


def group_by_domain(domain_B: Tensor | None) -> tuple[DomainGroup, ...]:
    """Return one group a domain, ascending by id."""
    if domain_B is None:
        return ()
    ids = domain_B.tolist()
    present = sorted(set(ids))
    if len(present) == 1:
        return (DomainGroup(domain=present[0], rows=None),)
    rows = [[row for row, other in enumerate(ids) if other == domain] for domain in present]
    return tuple(
        DomainGroup(domain=domain, rows=torch.tensor(row, device=domain_B.device)) for domain, row in zip(present, rows)
    )


def merge_groups(groups: tuple[DomainGroup, ...], parts: list[Tensor]) -> Tensor:
    """Put the groups' sequences back in the batch's order."""
    if len(parts) == 1:
        return parts[0]
    rows = torch.cat([group.rows for group in groups if group.rows is not None])
    return torch.cat(parts)[rows.argsort()]
