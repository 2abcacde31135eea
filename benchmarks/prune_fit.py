"""The forecast of `sigmoe prune` beside what was measured: how far it was off, and the fit of its constants.

Only prunings by criteria of data count: `random` and `weight` do not look at the sums that the forecast is made of.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..moe.prune.criteria import DATA_CRITERIA
from ..moe.prune.forecast import expected
from .prune_study import Outcome

COVERED = 0.9  # of the prunings fitted, within the range


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Loss added = scale * dropped^power, by least squares of the logarithms; most lie within a `factor` of it."""

    scale: float
    power: float
    factor: float
    prunings: int


def fit_forecast(outcomes: Sequence[Outcome]) -> Fit:
    """Return the fit to those of them that dropped and added something; ValueError where they lie on no line."""
    points = [
        (math.log(each.dropped), math.log(each.added))
        for each in _of_data(outcomes)
        if each.added > 0 and each.dropped > 0
    ]
    if len({x for x, _ in points}) < 2:
        raise ValueError("the forecast cannot be fitted: fewer than two different prunings added any loss")
    power, intercept = statistics.linear_regression(*zip(*points))
    off = sorted(abs(y - intercept - power * x) for x, y in points)
    factor = math.exp(off[math.ceil(COVERED * len(off)) - 1])
    return Fit(scale=math.exp(intercept), power=power, factor=factor, prunings=len(points))


def fit_note(outcomes: Sequence[Outcome]) -> str:
    """Return the fit to these outcomes as a sentence."""
    fit, runs = fit_forecast(outcomes), ", ".join(dict.fromkeys(each.run for each in outcomes))
    return (
        f"fitted to the {fit.prunings} prunings of {runs} by criteria of data that added loss: "
        f"{fit.scale:.3f} x^{fit.power:.3f}, nine in ten of them within a factor of {fit.factor:.3f} of it; x is the "
        "dropped share of moe/prune/forecast.py"
    )


def forecast_notes(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Return by run and budget how far the forecast was off, in points of the ratio, and the share within its range."""
    return tuple(
        f"forecast of {run}, error in points of the ratio (mean, median, largest, share within the range): "
        + "; ".join(_told(outcomes, run))
        for run in dict.fromkeys(outcome.run for outcome in outcomes)
    )


def _told(outcomes: Sequence[Outcome], run: str) -> Iterator[str]:
    for share in sorted({outcome.pruned for outcome in outcomes}):
        some = [each for each in _of_data(outcomes) if (each.run, each.pruned) == (run, share)]
        off = [100 * abs(math.exp(each.forecast) - math.exp(each.added)) for each in some]
        within = statistics.fmean(map(_is_within, some))
        figures = f"{statistics.fmean(off):.1f}, {statistics.median(off):.1f}, {max(off):.1f}"
        yield f"{share:.0%}: {figures}, {within:.0%}"


def _is_within(outcome: Outcome) -> bool:
    forecast = expected(outcome.dropped)
    return forecast.low <= outcome.added <= forecast.high


def _of_data(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [each for each in outcomes if each.criterion in DATA_CRITERIA]
