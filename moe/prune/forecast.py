"""What a pruning will cost, said before it is made: from the calibration's sums alone.

x is the dropped experts' share of EASY-EP's sum g |f| max(1 - cos(h before, h after), 0), taken over all sparse layers
together: so a layer counts by how far it turns the residual stream, in small models the first one far above the others.
The loss added is then about `_SCALE` x^`_POWER`.

The constants were fitted to two models of 4 layers of 8 experts (`benchmarks/prune_fit.py`; log-log least squares). On
a third one the forecast of a perplexity was off by 3, 9 and 27 points of its ratio on average at 25, 50 and 75 %
pruned, on one of 16 experts by 5, 16 and 45. Of the measured losses of the two fitted 94 and 87 % lie within the range,
of the third 99 %, of the one of 16 experts 87 %, and there 78 % at a quarter pruned, where an error costs least
(`suite=prune_quality`, benchmarks/results/prune-quality.md). All four were trained alike, on 0.5 million tokens: what
this is worth for large models nobody has measured. It tells a harmless budget from a ruinous one, not which of two
criteria is better. It is about text like the calibration's, without merging and healing.

Shape letters: E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .budget import Kept
from .sums import LayerSums

_SCALE, _POWER = 1.54, 1.36
_FACTOR = 1.92  # nine in ten of the prunings fitted lie within the forecast over this and times this


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The loss that a pruning adds in domain, nats a token, and where nine in ten of those fitted to lay."""

    added: float
    low: float
    high: float


def forecast(layers: Sequence[LayerSums], kept: Kept) -> Forecast:
    """Return what keeping the experts `kept` alone will add; 0 where all are kept, and never less for fewer of them."""
    return expected(dropped_share(layers, kept))


def expected(share: float) -> Forecast:
    """Return the forecast for x = `share`."""
    added = _SCALE * share**_POWER
    return Forecast(added=added, low=added / _FACTOR, high=added * _FACTOR)


def dropped_share(layers: Sequence[LayerSums], kept: Kept) -> float:
    """Return x, from 0 to 1; 0 where no layer turns anything."""
    dropped = total = 0.0
    for layer, ids in zip(layers, kept, strict=True):
        chosen = set(ids)
        values = layer.easy_ep_E.tolist()
        dropped += sum(value for expert, value in enumerate(values) if expert not in chosen)
        total += sum(values)
    return dropped / total if total else 0.0
