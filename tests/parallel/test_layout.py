import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.parallel.config import ParallelConfig
from sigmoe.parallel.layout import check_layout, place_experts

SHAPE = {"vocab_size": 100, "dim": 24, "num_layers": 2, "num_heads": 12, "num_kv_heads": 4, "expert_dim": 6}
GLOBAL = ModelConfig(**SHAPE, router=RouterConfig(name="top_k", num_experts=4))
DENSE = dataclasses.replace(GLOBAL, sparse_layers="none", ffn_dim=9)
SMALL = dataclasses.replace(GLOBAL, vocab_size=5)


def check(model=GLOBAL, *, world=4, batch=16, micro=2, **parallel):
    registry = model.build_registry(("a",))
    config = ParallelConfig(**parallel)
    return check_layout(model, registry, config, world_size=world, global_batch=batch, micro_batch=micro)


def test_one_set_goes_round_the_ranks():
    assert place_experts([(0, 1, 2, 3, 4)], 2) == ((0, 2, 4), (1, 3))


def test_small_sets_begin_where_the_one_before_ended():
    assert place_experts([(0,), (1,), (2,), (3,)], 4) == ((0,), (1,), (2,), (3,))


def test_a_shared_expert_lies_where_its_first_domain_puts_it():
    assert place_experts([(0, 1, 2), (2, 3)], 3) == ((0,), (1, 3), (2,))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 8))
def test_every_expert_has_one_rank_and_a_domain_is_spread(sizes, ep):
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    sets = [tuple(range(end - size, end)) for size, end in zip(sizes, ends)]
    placement = place_experts(sets, ep)
    assert len(placement) == ep
    assert sorted(expert for experts in placement for expert in experts) == list(range(sum(sizes)))
    for experts in sets:
        shares = [len(set(experts) & set(rank)) for rank in placement]
        assert max(shares) - min(shares) <= 1


def test_accumulation_steps():
    assert check() == 2
    assert check(tp=2) == 4
    assert check(tp=4, ep=4, etp=1, micro=16) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tp": 3, "world": 6}, ["parallel.tp=3", "num_kv_heads 4", "valid would be 1, 2"]),
        ({"tp": 2, "world": 3}, ["parallel.tp=2", "3 process", "valid would be 1"]),
        ({"ep": 3, "world": 6}, []),
        ({"ep": 8, "world": 8}, ["parallel.ep=8", "has 4", "valid would be 1, 2, 4"]),
        ({"ep": 4, "tp": 2, "world": 4}, ["parallel.ep=4", "etp=2", "valid would be 1, 2"]),
        ({"tp": 4}, ["etp=4", "expert_dim 6", "valid would be 1"]),
        ({"batch": 12, "micro": 2}, ["global_batch 12", "dp (4)", "micro_batch 1, 3", "multiple of 8"]),
        ({"batch": 6, "micro": 1}, ["global_batch 6", "valid would be global_batch a multiple of 4"]),
        ({"model": DENSE, "ep": 2}, ["parallel.ep=2", "no sparse layer"]),
        ({"model": DENSE, "tp": 2}, ["parallel.tp=2", "ffn_dim 9", "valid would be 1"]),
        (
            {"model": dataclasses.replace(GLOBAL, vocab_size=5), "tp": 4, "etp": 1},
            ["vocab_size 5", "valid would be 1, 2"],
        ),
    ],
)
def test_what_does_not_fit_is_named_with_what_would(settings, words):
    if not words:
        assert check(**settings, batch=12) == 1
        return
    with pytest.raises(ValueError) as error:
        check(**settings)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tp": 0}, "parallel.tp must be at least 1, got 0"),
        ({"ep": -1}, "parallel.ep must be at least 1, got -1"),
        ({"tp": 4, "etp": 2}, r"parallel.etp must be 1 or tp \(4\), got 2"),
        ({"etp": 2}, "parallel.etp must be 1, got 2"),
        ({"zero_stage": 0}, "parallel.zero_stage must be 1 or 2, got 0"),
        ({"zero_stage": 3}, r"\Aparallel.zero_stage must be 1 or 2, got 3: DeepSpeed's stage 3 takes [^\n]+\Z"),
        ({"recompute": "all"}, "parallel.recompute must be one of none, layer, experts, attention, got 'all'"),
        ({"offload": "disk"}, "parallel.offload must be one of none, cpu, got 'disk'"),
    ],
)
def test_a_config_checks_itself(settings, words):
    with pytest.raises(ValueError, match=words):
        ParallelConfig(**settings)


def test_experts_follow_tp_unless_told():
    assert ParallelConfig(tp=4).expert_tp == 4
    assert ParallelConfig(tp=4, etp=1).expert_tp == 1
