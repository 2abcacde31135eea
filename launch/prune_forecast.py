"""What `sigmoe prune` says that it will cost before it prunes: the forecast of what is kept, and of other budgets."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..moe.prune.budget import Budget, Kept
from ..moe.prune.forecast import forecast
from ..moe.prune.sums import LayerSums
from .console import notes

_SHARES = (0.25, 0.5, 0.75)

Forecasts = list[dict[str, Any]]  # plain JSON data, a budget each, from few experts to many


def forecast_budgets(layers: Sequence[LayerSums], kept: Kept, choose: Callable[[Budget], Kept]) -> Forecasts | None:
    """Return the forecast of `kept`, which is `chosen`, and of what `choose` would keep of each layer under others.

    `kept` in them is the fraction of all experts that stays. None where the sums are not finite.
    """
    if not all(bool(layer.easy_ep_E.isfinite().all()) for layer in layers):
        return None
    others = [choose(Budget(keep=share)) for share in _SHARES]
    told = [_told(layers, other) | {"chosen": False} for other in others if other != kept]
    return sorted([*told, _told(layers, kept) | {"chosen": True}], key=lambda budget: (budget["kept"], budget["added"]))


def print_forecast(forecasts: Sequence[Mapping[str, Any]]) -> None:
    """Print it as a sentence, as factors of the perplexity."""
    (chosen,) = (budget for budget in forecasts if budget["chosen"])
    added, low, high = (f"{math.exp(chosen[name]):,.2f}" for name in ("added", "low", "high"))
    others = ", ".join(f"{b['kept']:.0%} {math.exp(b['added']):,.2f}" for b in forecasts if not b["chosen"])
    notes().print(
        f"forecast for text like the calibration's, before any healing: perplexity x {added} ({low} to {high}); "
        f"by the experts kept: {others}"
    )


def _told(layers: Sequence[LayerSums], kept: Kept) -> dict[str, Any]:
    share = sum(map(len, kept)) / sum(layer.num_experts for layer in layers)
    return {"kept": share, **asdict(forecast(layers, kept))}
