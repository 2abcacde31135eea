"""Which experts `sigmoe prune` keeps, what becomes of them, and what that is expected to cost."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..moe.config import layer_experts
from ..moe.extract import Submodel
from ..moe.extract.unwritten import unwritten_model
from ..moe.prune.budget import Budget, Kept, model_sizes
from ..moe.prune.choice import choose_kept, rate_experts
from ..moe.prune.criteria import weight_saliency
from ..moe.prune.merge import Groups, group_experts, plan_merged
from ..moe.prune.plan import plan_pruned
from ..moe.prune.sums import CalibrationSums
from ..moe.prune.text import CalibrationText
from ..moe.stored import StoredModel
from ..moe.workers import Workers
from .console import progress_sink
from .heal import Healed, check_host_memory, heal
from .prune_config import PruneCommand
from .prune_forecast import Forecasts, forecast_budgets


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which experts stay, and why; `pruned` is the model that they make."""

    kept: Kept
    saliency: tuple[Tensor, ...]
    sums: CalibrationSums | None
    forecasts: Forecasts | None
    groups: Groups | None
    pruned: Submodel
    healed: Healed | None = None


def choose(command: PruneCommand, parent: StoredModel, sums: CalibrationSums | None, ranks: Workers) -> Choice:
    """Rate all experts, and choose. Raises ValueError where the budget is no possible one."""
    weights, config = None, parent.config
    if command.criterion == "weight":
        with progress_sink(transient=True, bytes=True) as progress:
            weights = weight_saliency(parent, ranks, partial(progress, "rating weights"))
    layers = None if sums is None else sums.layers

    def rate() -> tuple[list[list[float]], Kept, Forecasts | None]:
        experts, sizes = layer_experts(config, parent.registry), model_sizes(parent)
        values = rate_experts(command.criterion, experts, layers=layers, weights=weights, seed=command.seed)

        def keep(budget: Budget) -> Kept:
            return choose_kept(command.criterion, values, layers, budget, config, sizes)

        kept = keep(command.budget)
        forecasts = None if layers is None else forecast_budgets(layers, kept, keep)
        return [value_E.tolist() for value_E in values], kept, forecasts

    rates, ids, forecasts = ranks.from_first(rate)  # one rank's: another kind of machine may round otherwise
    kept = tuple(map(tuple, ids))
    with ranks.together():
        pruned, groups = plan_pruned(config, parent.registry, kept), None
        if command.merge:
            assert layers is not None
            groups = group_experts(layers, kept)
            pruned = plan_merged(pruned, layers, groups)
    saliency = tuple(torch.tensor(values, dtype=torch.float64) for values in rates)
    return Choice(kept=kept, saliency=saliency, sums=sums, forecasts=forecasts, groups=groups, pruned=pruned)


def heal_choice(command: PruneCommand, parent: StoredModel, choice: Choice, text: CalibrationText) -> Choice:
    """Train what was chosen. Raises ValueError where memory is too small, or a step's loss is not finite."""
    check_host_memory(choice.pruned)
    with progress_sink(transient=True) as progress:
        healed = heal(
            unwritten_model(parent, choice.pruned),
            text,
            steps=command.heal,
            lr=command.heal_lr,
            progress=partial(progress, "healing"),
        )
    return replace(choice, healed=healed)
