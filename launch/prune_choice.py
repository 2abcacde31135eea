"""Which experts `sigmoe prune` keeps, what becomes of them, and what that is expected to cost."""

from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from ..moe.config import layer_experts
from ..moe.extract import Submodel
from ..moe.extract.unwritten import unwritten_model
from ..moe.prune.budget import Budget, Kept, choose_experts, choose_subsets, model_sizes
from ..moe.prune.criteria import random_saliency, saliency, subset_errors, weight_saliency
from ..moe.prune.merge import Groups, group_experts, plan_merged
from ..moe.prune.plan import plan_pruned
from ..moe.prune.sums import CalibrationSums
from ..moe.prune.text import CalibrationText
from ..moe.stored import StoredModel
from .console import progress_sink
from .heal import Healed, check_memory, heal
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


def choose(command: PruneCommand, parent: StoredModel, sums: CalibrationSums | None) -> Choice:
    """Rate all experts, and choose. Raises ValueError where the budget is no possible one."""
    config, sizes, values = parent.config, model_sizes(parent), _rate(command, parent, sums)

    def keep(budget: Budget) -> Kept:
        if command.criterion == "reconstruction":
            assert sums is not None
            return choose_subsets([subset_errors(layer) for layer in sums.layers], budget, config, sizes)
        return choose_experts(values, budget, config, sizes)

    kept = keep(command.budget)
    forecasts = None if sums is None else forecast_budgets(sums.layers, kept, keep)
    pruned, groups = plan_pruned(config, parent.registry, kept), None
    if command.merge:
        assert sums is not None
        groups = group_experts(sums.layers, kept)
        pruned = plan_merged(pruned, sums.layers, groups)
    return Choice(kept=kept, saliency=values, sums=sums, forecasts=forecasts, groups=groups, pruned=pruned)


def heal_choice(command: PruneCommand, parent: StoredModel, choice: Choice, text: CalibrationText) -> Choice:
    """Train what was chosen. Raises ValueError where memory is too small, or a step's loss is not finite."""
    check_memory(choice.pruned)
    with progress_sink(transient=True) as progress:
        healed = heal(
            unwritten_model(parent, choice.pruned),
            text,
            steps=command.heal,
            lr=command.heal_lr,
            progress=partial(progress, "healing"),
        )
    return replace(choice, healed=healed)


def _rate(command: PruneCommand, parent: StoredModel, sums: CalibrationSums | None) -> tuple[Tensor, ...]:
    match command.criterion:
        case "random":
            return random_saliency(layer_experts(parent.config, parent.registry), command.seed)
        case "weight":
            with progress_sink(transient=True, bytes=True) as progress:
                return weight_saliency(parent, partial(progress, "rating weights"))
        case criterion:
            assert sums is not None
            return saliency(sums.layers, criterion)
