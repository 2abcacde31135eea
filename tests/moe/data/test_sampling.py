from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmoe.moe.data.sampling import Phase, Sampler

NAMES = ("a", "b", "c", "d", "e")
WEIGHT = st.one_of(st.integers(0, 5), st.sampled_from([0.1, 0.2, 0.25, 1 / 3, 0.7, 0.90001]), st.floats(1e-3, 10))
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=5).filter(any)


def brute_force(weights: dict[str, float], number: int) -> list[tuple[int, int]]:
    """The first `number` events: all times of all domains, sorted."""
    exact = {name: Fraction(repr(float(weight))) for name, weight in weights.items()}
    total = sum(exact.values())
    events = [
        ((k + Fraction(1, 2)) * total / exact[name], domain, k)
        for domain, name in enumerate(weights)
        if exact[name]
        for k in range(number)
    ]
    return [(domain, k) for _, domain, k in sorted(events)[:number]]


def located(sampler: Sampler, indices: range) -> list[tuple[int, int]]:
    domain, ordinal = sampler.locate(indices)
    return list(zip(domain.tolist(), ordinal.tolist()))


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, number=st.integers(1, 120))
def test_closed_form_equals_the_simulation(weights: list[float], number: int) -> None:
    named = dict(zip(NAMES, weights))
    sampler = Sampler([Phase(weights=named)], tuple(named))
    expected = brute_force(named, number)
    assert located(sampler, range(number)) == expected
    assert [located(sampler, range(index, index + 1))[0] for index in range(number)] == expected
    for consumed in (0, number // 2, number):
        counts = [sum(domain == d for domain, _ in expected[:consumed]) for d in range(len(named))]
        assert list(sampler.counts(consumed).values()) == counts


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, first=st.integers(0, 10**12), length=st.integers(0, 40))
def test_any_range_is_a_piece_of_any_other(weights: list[float], first: int, length: int) -> None:
    named = dict(zip(NAMES, weights))
    sampler = Sampler([Phase(weights=named)], tuple(named))
    whole = located(sampler, range(first, first + 40))
    assert located(sampler, range(first, first + length)) == whole[:length]
    assert located(sampler, range(first + length, first + 40)) == whole[length:]


@settings(max_examples=150, deadline=None)
@given(weights=WEIGHTS, number=st.one_of(st.integers(0, 300), st.integers(10**6, 10**9)))
def test_weights_are_kept_at_every_prefix(weights: list[float], number: int) -> None:
    named = dict(zip(NAMES, weights))
    sampler = Sampler([Phase(weights=named)], tuple(named))
    counts = sampler.counts(number)
    assert sum(counts.values()) == number
    total = sum(Fraction(repr(float(weight))) for weight in weights)
    active = sum(weight > 0 for weight in weights)
    for name, weight in named.items():
        share = Fraction(repr(float(weight))) / total
        bound = Fraction(1, 2) + share * max(active - 2, 0) / 2
        assert abs(counts[name] - number * share) <= bound
        if active <= 3 or share * (active - 2) <= 1:
            assert abs(counts[name] - number * share) <= 1


def test_six_equal_domains_take_turns() -> None:
    sampler = Sampler([Phase(weights=dict.fromkeys("abcdef", 1.0))], tuple("abcdef"))
    assert located(sampler, range(12)) == [(d, k) for k in range(2) for d in range(6)]


@settings(max_examples=50, deadline=None)
@given(
    first=WEIGHTS.filter(lambda w: len(w) == 3),
    second=WEIGHTS.filter(lambda w: len(w) == 3),
    change=st.integers(1, 60),
)
def test_phases_carry_consumption(first: list[float], second: list[float], change: int) -> None:
    names = NAMES[:3]
    phases = [
        Phase(end=change, weights=dict(zip(names, first))),
        Phase(start=change, weights=dict(zip(names, second))),
    ]
    sampler = Sampler(phases, names)
    rows = located(sampler, range(120))
    assert rows[:change] == brute_force(dict(zip(names, first)), change)
    later = brute_force(dict(zip(names, second)), 120 - change)
    assert [domain for domain, _ in rows[change:]] == [domain for domain, _ in later]
    for domain in range(3):
        ordinals = [ordinal for d, ordinal in rows if d == domain]
        assert ordinals == list(range(len(ordinals)))
    for consumed in (change - 1, change, change + 1, 120):
        expected = np.bincount([domain for domain, _ in rows[:consumed]], minlength=3)
        assert list(sampler.counts(consumed).values()) == expected.tolist()


def test_a_domain_without_a_weight_is_never_drawn() -> None:
    sampler = Sampler([Phase(weights={"b": 2.0})], ("a", "b", "c"))
    assert located(sampler, range(3)) == [(1, 0), (1, 1), (1, 2)]
    assert sampler.counts(3) == {"a": 0, "b": 3, "c": 0}


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "must start at sample 0"),
        ([Phase(start=1, weights={"a": 1})], "must start at sample 0"),
        ([Phase(end=5, weights={"a": 1}), Phase(start=6, weights={"a": 1})], "leave no gap"),
        ([Phase(weights={"a": 1}), Phase(start=6, weights={"a": 1})], "leave no gap"),
        ([Phase(weights={"a": 1, "x": 1})], "unknown domain 'x'; known domains: a, b"),
    ],
)
def test_wrong_phases_are_refused(phases: list[Phase], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(phases, ("a", "b"))


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}])
def test_wrong_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        Phase(weights=weights)


def test_a_sample_that_no_phase_covers_is_refused() -> None:
    sampler = Sampler([Phase(end=5, weights={"a": 1})], ("a",))
    assert len(located(sampler, range(5))) == 5
    assert sampler.counts(5) == {"a": 5}
    with pytest.raises(ValueError, match="no phase covers sample 5"):
        sampler.locate(range(4, 6))
    with pytest.raises(ValueError, match="range of step 1"):
        sampler.locate(range(0, 4, 2))
