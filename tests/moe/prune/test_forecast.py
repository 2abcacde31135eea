"""The forecast of what a pruning costs: known numbers, zero without dropping, never less for dropping more."""

import dataclasses
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sigmoe.moe.prune.forecast import dropped_share, expected, forecast
from sigmoe.moe.prune.sums import LayerSums


def layer(*easy_ep):
    value_E = torch.tensor(easy_ep, dtype=torch.float64)
    zero_E = torch.zeros_like(value_E)
    return LayerSums(
        tokens=5,
        count_E=zero_E.long(),
        gate_E=zero_E,
        norm_E=zero_E,
        gate_norm_E=zero_E,
        easy_ep_E=value_E,
        prob_EE=zero_E.outer(zero_E),
        subset_error=None,
    )


LAYERS = [layer(1.0, 2.0, 5.0), layer(0.5, 1.5, 0.0, 0.0)]


def test_layers_count_by_all_that_they_do():
    assert dropped_share(LAYERS, ((0, 2), (1, 3))) == (2.0 + 0.5) / 10
    assert dropped_share(LAYERS, ((2,), (0, 1, 2))) == 3.0 / 10


def test_known_numbers():
    half = forecast([layer(1.0, 1.0)], ((0,),))
    assert half.added == pytest.approx(1.54 * 0.5**1.36) == pytest.approx(0.6, abs=1e-4)
    assert (half.low, half.high) == (pytest.approx(half.added / 1.92), pytest.approx(half.added * 1.92))


def test_nothing_dropped_costs_nothing():
    for kept in (((0, 1, 2), (0, 1, 2, 3)), ((0, 1, 2), (0, 1))):  # the last two experts do nothing
        assert dataclasses.astuple(forecast(LAYERS, kept)) == (0.0, 0.0, 0.0)
    assert forecast([layer(0.0, 0.0)], ((1,),)) == expected(0.0)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=5))
def test_dropping_more_never_costs_less(values):
    layers, ids = [layer(*values)], range(len(values))
    for size in range(1, len(values)):
        for kept in combinations(ids, size):
            for more in set(ids) - set(kept):
                fewer_dropped = forecast(layers, (tuple(sorted((*kept, more))),))
                assert forecast(layers, (kept,)).added >= fewer_dropped.added >= 0
