"""Budgets: exact counts, floors, ties, bytes by the formula; what cannot be is said in one line."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.counts import count_parameters
from sigmoe.moe.prune.budget import Budget, ModelSizes, choose_experts, choose_subsets, model_sizes, parse_budget


def config(top_k=2, experts=8, layers=3):
    router = RouterConfig(name="top_k", num_experts=experts, top_k=top_k, renormalize=top_k > 1)
    return ModelConfig(
        vocab_size=31, dim=16, num_layers=layers, num_heads=2, num_kv_heads=1, expert_dim=8, router=router
    )


def choose(saliency, config, sizes=None, **keys):
    return choose_experts([torch.tensor(row).double() for row in saliency], parse_budget(keys), config, sizes)


# Few different values: ties are common.
saliencies = st.integers(1, 4).flatmap(
    lambda layers: st.lists(
        st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.5, 7.0]), min_size=3, max_size=9), min_size=layers, max_size=layers
    )
)


def is_best_of_its_size(kept, values):
    """Whether `kept` is what sorting by (value, lower id) keeps, ascending."""
    return kept == tuple(sorted(sorted(range(len(values)), key=lambda e: (-values[e], e))[: len(kept)]))


@settings(deadline=None, max_examples=50)
@given(saliencies, st.integers(1, 3), st.data())
def test_each_layer_keeps_its_best_down_to_the_floor(saliency, top_k, data):
    keep = data.draw(st.fractions(0, 1).filter(bool).map(float))
    kept = choose(saliency, config(top_k), keep=keep)
    for experts, values in zip(kept, saliency, strict=True):
        assert len(experts) == max(top_k, math.floor(keep * len(values) + 0.5))
        assert is_best_of_its_size(experts, values)


@settings(deadline=None, max_examples=50)
@given(saliencies, st.integers(1, 3), st.data())
def test_global_keeps_exactly_so_many(saliency, top_k, data):
    total = data.draw(st.integers(top_k * len(saliency), sum(map(len, saliency))))
    kept = choose(saliency, config(top_k), **{"global": total})
    assert sum(map(len, kept)) == total
    shares = [[value / (sum(values) or 1) for value in values] for values in saliency]
    for experts, values in zip(kept, saliency, strict=True):
        assert len(experts) >= top_k
        assert is_best_of_its_size(experts, values)
    # Nobody dropped has a larger share than somebody kept above the floor.
    dropped = [s for row, experts in zip(shares, kept) for e, s in enumerate(row) if e not in experts]
    above = [min(row[e] for e in experts) for row, experts in zip(shares, kept) if len(experts) > top_k]
    assert not dropped or not above or max(dropped) <= min(above) + 1e-12


@settings(deadline=None, max_examples=50)
@given(saliencies, st.integers(1, 3), st.data())
def test_bytes_is_the_largest_model_not_above(saliency, top_k, data):
    numbers = [len(row) for row in saliency]
    sizes = ModelSizes(
        shared=data.draw(st.integers(0, 99)), expert=tuple(data.draw(st.integers(1, 9)) for _ in numbers)
    )
    target = data.draw(st.integers(sizes.total([min(top_k, n) for n in numbers]), sizes.total(numbers) + 5))
    kept = choose(saliency, config(top_k), sizes, bytes=target)
    counts = [len(experts) for experts in kept]
    assert sizes.total(counts) <= target
    most = max(counts)
    assert counts == [min(most, number) for number in numbers]  # equal wherever the layers are
    if counts != numbers:
        assert sizes.total([min(most + 1, number) for number in numbers]) > target


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([3, 4]), min_size=1, max_size=3), st.integers(1, 2), st.randoms(), st.data())
def test_subsets_have_the_lowest_error(numbers, top_k, random, data):
    errors = [torch.tensor([random.choice([0.0, 1.0, 2.5, 4.0]) for _ in range(1 << n)]).double() for n in numbers]
    sized = [
        {
            s: float(error[sum(1 << e for e in s)])
            for k in range(top_k, n + 1)
            for s in itertools.combinations(range(n), k)
        }
        for n, error in zip(numbers, errors)
    ]
    size = data.draw(st.integers(top_k, 3))
    for subset, costs in zip(choose_subsets(errors, Budget(experts=size), config(top_k)), sized, strict=True):
        assert (costs[subset], subset) == min((cost, s) for s, cost in costs.items() if len(s) == size)
    total = data.draw(st.integers(top_k * len(numbers), sum(numbers)))
    kept = choose_subsets(errors, Budget(total=total), config(top_k))
    best = min(
        sum(costs[s] for s, costs in zip(choice, sized))
        for choice in itertools.product(*sized)
        if sum(map(len, choice)) == total
    )
    assert sum(map(len, kept)) == total
    assert sum(costs[subset] for subset, costs in zip(kept, sized)) == best


def test_halves_go_up_and_lists_go_by_layer():
    saliency = [[1.0, 2.0, 3.0, 4.0, 5.0]] * 3
    assert [len(experts) for experts in choose(saliency, config(), keep=0.5)] == [3, 3, 3]
    assert choose(saliency, config(), experts=(2, 5, 3)) == ((3, 4), (0, 1, 2, 3, 4), (2, 3, 4))
    assert sum(map(len, choose(saliency, config(), **{"global": 0.5}))) == 8
    assert sum(map(len, choose(saliency, config(), **{"global": 0.01}))) == 6  # the floor
    assert parse_budget({"experts": (2, 5, 3)}).may_be_unequal and parse_budget({"global": 0.5}).may_be_unequal
    assert not parse_budget({"keep": 0.5}).may_be_unequal and not parse_budget({"bytes": 9}).may_be_unequal


def test_layers_of_different_scale_share_a_global_budget():
    row = [4.0, 3.0, 2.0, 1.0]
    kept = choose([row, [1000 * value for value in row]], config(top_k=1), **{"global": 4})
    assert kept == ((0, 1), (0, 1))


@pytest.mark.parametrize(
    ("text", "number"), [("7", 7), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("3k", 3000), ("4mib", 4 << 20)]
)
def test_bytes_may_have_a_unit(text, number):
    assert parse_budget({"bytes": text}).bytes == number


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "give one of keep=, experts=, global= and bytes=, got 0"),
        ({"keep": 0.5, "bytes": 7}, "got 2"),
        ({"keep": 0.0}, "keep must lie above 0"),
        ({"keep": 1.5}, "keep must lie above 0 and be at most 1, got 1.5"),
        ({"keep": math.nan}, "keep must lie above 0"),
        ({"global": 1.5}, "global must be a fraction"),
        ({"global": 5}, "global=5: 3 sparse layers whose routers choose 2 can keep from 6 to 15"),
        ({"global": 16}, "can keep from 6 to 15"),
        ({"experts": 1}, "experts: 1 in sparse layer 0, which has 5 and whose router chooses 2"),
        ({"experts": (3, 3, 6)}, "experts: 6 in sparse layer 2"),
        ({"experts": (3, 3)}, "experts lists 2 layers, but the model has 3 sparse ones"),
        ({"bytes": 65}, "bytes=65: with 2 experts a layer the model still has 66 bytes"),
        ({"bytes": "2 apples"}, "bytes must be a number, with a unit if wanted"),
    ],
)
def test_what_cannot_be_is_said(keys, words):
    with pytest.raises(ValueError, match=words):
        choose([[1.0] * 5] * 3, config(), ModelSizes(shared=6, expert=(10, 10, 10)), **keys)


def test_an_infinite_saliency_is_refused():
    with pytest.raises(ValueError, match="sparse layer 1: a saliency is not finite"):
        choose([[1.0, 2.0, 3.0], [1.0, math.inf, 3.0]], config(), keep=1.0)


@pytest.mark.parametrize("name", ["mixtral", "mixtral tied", "qwen3_moe", "olmoe"])
def test_sizes_are_those_of_the_formula(hf_model, name):
    _, model = hf_model(name, torch.bfloat16)
    sizes, sparse = model_sizes(model), len(model.config.sparse_layer_ids)
    numbers = [model.config.router.num_experts] * sparse
    assert sizes.total(numbers) == 2 * count_parameters(model.config, model.registry).total
    one = 3 * model.config.dim * model.config.expert_dim + model.config.dim
    assert sizes.expert == (2 * one,) * sparse
