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
_FEW = 1024  # tokens of calibration

Forecasts = list[dict[str, Any]]  # plain JSON data, a budget each, from few experts to many


def forecast_budgets(layers: Sequence[LayerSums], kept: Kept, choose: Callable[[Budget], Kept]) -> Forecasts | None:
    """Return the forecast of `kept`, which is `chosen`, and of what `choose` would keep of each layer under others.

    `kept` in them is the fraction of all experts that stays. None where the sums are not finite.
    """
    if not all(bool(layer.easy_ep_E.isfinite().all()) for layer in layers):
        return None
    others = dict.fromkeys(choose(Budget(keep=share)) for share in _SHARES)  # which may be the same for some
    told = [_told(layers, other) | {"chosen": False} for other in others if other != kept]
    return sorted([*told, _told(layers, kept) | {"chosen": True}], key=lambda budget: (budget["kept"], budget["added"]))


def print_forecast(forecasts: Sequence[Mapping[str, Any]], tokens: int) -> None:
    """Print it as a sentence, as factors of the perplexity; its sums are of so many `tokens`."""
    (chosen,) = (budget for budget in forecasts if budget["chosen"])
    added, low, high = (told_ratio(chosen[name]) for name in ("added", "low", "high"))
    between = f" ({low} to {high} for nine in ten of theirs)" if low != high else ""
    others = ", ".join(f"{b['kept']:.0%} {told_ratio(b['added'])}" for b in forecasts if not b["chosen"])
    notes().print(
        "rough forecast, fitted to two small models (README), for text like the calibration's, before any merging or "
        f"healing: perplexity x {added}{between}" + (f"; by the experts kept: {others}" if others else "")
    )
    if tokens < _FEW:
        notes().print(f"sums of {tokens:,} tokens say little, of the experts too: calibrate on more (tokens=, data=)")


def told_ratio(added: float) -> str:
    """Return the factor of the perplexity that a loss `added` makes; a small one is no promise of none."""
    ratio = math.exp(added)
    return "below 1.01" if 1 < ratio < 1.01 else f"{ratio:,.2f}"


def _told(layers: Sequence[LayerSums], kept: Kept) -> dict[str, Any]:
    share = sum(map(len, kept)) / sum(layer.num_experts for layer in layers)
    return {"kept": share, **asdict(forecast(layers, kept))}
