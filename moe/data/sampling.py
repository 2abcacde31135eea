"""Which domain the i-th sample of a run comes from: a pure function of the index, by exact integer arithmetic.

Inside a phase the k-th sample of a domain with normalised weight w has the time (k + 1/2) / w; the i-th sample of the
phase is the i-th of all those events in the order of their times, ties by domain id. After n samples a domain has been
drawn n*w times, give or take 1/2 + w * (D - 2) / 2 for D domains with a weight: less than one for two domains, at most
one for three, or for any number of which none has a weight above 1 / (D - 2). The deviation never grows with n.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Samples `start` to `end` (None: to the end of the run) are drawn with these weights a domain.

    Weights need not add up to 1; a domain that is not named has weight 0.
    """

    start: int = 0
    end: int | None = None
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        bad = {name: weight for name, weight in self.weights.items() if not (math.isfinite(weight) and weight >= 0)}
        if bad:
            raise ValueError(f"weights must be finite and not negative, got {bad}")
        if not any(self.weights.values()):
            raise ValueError("a phase needs at least one domain with a weight above 0")
        if self.start < 0 or (self.end is not None and self.end <= self.start):
            raise ValueError(f"a phase must end after it starts, got {self.start} to {self.end}")


class Sampler:
    """Maps global sample indices to (domain id, ordinal inside that domain).

    `domains` are the names in the order of their ids. What a domain gave in earlier phases stays given: its ordinals
    go on where they stopped. Raises ValueError if the phases leave a gap, do not begin at 0, or name an unknown domain.
    """

    def __init__(self, phases: Sequence[Phase], domains: Sequence[str]) -> None:
        self.phases = tuple(phases)
        self.domains = tuple(domains)
        if not self.phases or self.phases[0].start != 0:
            raise ValueError("the first phase must start at sample 0")
        for before, after in zip(self.phases, self.phases[1:]):
            if before.end != after.start:
                raise ValueError(f"a phase ends at sample {before.end}, the next starts at {after.start}: leave no gap")
        self._merges = tuple(_Merge.of([phase.weights.get(name, 0.0) for name in domains]) for phase in self.phases)
        self._given = [np.zeros(len(self.domains), np.int64)]
        for phase, merge in zip(self.phases, self._merges):
            unknown = sorted(set(phase.weights) - set(self.domains))
            if unknown:
                raise ValueError(f"unknown domain {unknown[0]!r}; known domains: {', '.join(self.domains)}")
            if phase.end is not None:
                self._given.append(self._given[-1] + merge.counts(phase.end - phase.start))

    def locate(self, indices: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return domain ids and ordinals, int64 `[len(indices)]` each, of consecutive sample indices.

        Costs O(D log D + n log D), wherever the range begins. ValueError if no phase covers an index.
        """
        if indices.step != 1 or indices.start < 0:
            raise ValueError(f"sample indices must be a range of step 1 from 0 on, got {indices}")
        domains, ordinals = [], []
        position = indices.start
        while position < indices.stop:
            number = self._phase_of(position)
            phase = self.phases[number]
            stop = indices.stop if phase.end is None else min(indices.stop, phase.end)
            domain, ordinal = self._merges[number].events(position - phase.start, stop - position)
            domains.append(domain)
            ordinals.append(ordinal + self._given[number][domain])
            position = stop
        empty = np.empty(0, np.int64)
        return np.concatenate([empty, *domains]), np.concatenate([empty, *ordinals])

    def counts(self, consumed: int) -> dict[str, int]:
        """Return how many of the first `consumed` samples came from each domain."""
        number = self._phase_of(max(consumed - 1, 0))
        count = self._given[number] + self._merges[number].counts(consumed - self.phases[number].start)
        return dict(zip(self.domains, count.tolist()))

    def _phase_of(self, index: int) -> int:
        for number, phase in enumerate(self.phases):
            if phase.start <= index and (phase.end is None or index < phase.end):
                return number
        raise ValueError(f"no phase covers sample {index}: the last one ends at {self.phases[-1].end}")


@dataclass(frozen=True, kw_only=True)
class _Merge:
    """The merged event sequence of one phase. Times are integers: event k of domain d is at (2k + 1) * period[d]."""

    num_domains: int
    ids: tuple[int, ...]
    periods: tuple[int, ...]
    unit: Fraction = field(repr=False)  # integer time that passes while one sample is drawn

    @staticmethod
    def of(weights: Sequence[float]) -> "_Merge":
        """Build from one weight a domain. Decimal weights are taken as they were written: 0.1 is one tenth."""
        exact = [Fraction(repr(float(weight))) for weight in weights]
        ids = tuple(d for d, weight in enumerate(exact) if weight > 0)
        if not ids:
            return _Merge(num_domains=len(weights), ids=(), periods=(), unit=Fraction(1))
        common = math.lcm(*(weight.denominator for weight in exact))
        shares = [int(exact[d] * common) for d in ids]
        cycle = math.lcm(*shares)
        periods = tuple(cycle // share for share in shares)
        return _Merge(num_domains=len(weights), ids=ids, periods=periods, unit=Fraction(2 * cycle, sum(shares)))

    def counts(self, number: int) -> NDArray[np.int64]:
        """Return how many of the first `number` events each domain has, int64 `[D]`."""
        count, _ = self._advance(number)
        result = np.zeros(self.num_domains, np.int64)
        result[list(self.ids)] = count
        return result

    def events(self, first: int, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return domain ids and ordinals of events `first` to `first + number`."""
        count, heap = self._advance(first)
        domain = np.empty(number, np.int64)
        ordinal = np.empty(number, np.int64)
        for row in range(number):
            slot = self._pop(heap)
            domain[row] = self.ids[slot]
            ordinal[row] = count[slot]
            count[slot] += 1
        return domain, ordinal

    def _advance(self, number: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the state after `number` events: counts by slot, and a heap of (next time, slot).

        At a real time t a domain's count is within 1/2 of w*t, so at t = number - D/2 - 1 at most `number` events
        have happened and only about D are left to walk.
        """
        time = math.floor(self.unit * (Fraction(number - 1) - Fraction(len(self.ids), 2)))
        count = [max(0, (time + period - 1) // (2 * period)) for period in self.periods]
        heap = [((2 * given + 1) * period, slot) for slot, (given, period) in enumerate(zip(count, self.periods))]
        heapq.heapify(heap)
        for _ in range(number - sum(count)):
            count[self._pop(heap)] += 1
        return count, heap

    def _pop(self, heap: list[tuple[int, int]]) -> int:
        time, slot = heap[0]
        heapq.heapreplace(heap, (time + 2 * self.periods[slot], slot))
        return slot
