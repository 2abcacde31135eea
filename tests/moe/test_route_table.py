import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.model import Transformer
from sigmoe.moe.route_table import build_route_row, fill_route_tables

COUNTS = st.lists(st.integers(0, 3) | st.integers(0, 10**6), min_size=1, max_size=60).map(torch.tensor)


def loads(count_V, row_V, num_experts):
    return torch.zeros(num_experts, dtype=torch.int64).index_add_(0, row_V.long(), count_V)


@settings(max_examples=80, deadline=None)
@given(COUNTS, st.integers(1, 7), st.integers(0, 3))
def test_loads_are_balanced_and_every_expert_is_used(count_V, num_experts, seed):
    row_V = build_route_row(count_V, num_experts, seed, 0, "a")
    assert (row_V.dtype, row_V.shape) == (torch.int32, count_V.shape)
    assert set(row_V.tolist()) <= set(range(num_experts))
    load_E = loads(count_V, row_V, num_experts)
    assert int(load_E.max()) * num_experts <= int(count_V.sum()) + num_experts * int(count_V.max())
    assert len(row_V.unique()) == min(num_experts, len(count_V))
    assert torch.equal(row_V, build_route_row(count_V, num_experts, seed, 0, "a"))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7))
def test_unseen_tokens_spread_evenly(num_tokens, num_experts):
    row_V = build_route_row(torch.zeros(num_tokens, dtype=torch.int64), num_experts, 0, 0, "a")
    used = torch.bincount(row_V, minlength=num_experts)
    assert int(used.max() - used.min()) <= 1


def test_unseen_tokens_fill_up_the_lighter_experts_last():
    count_V = torch.zeros(300, dtype=torch.int64)
    count_V[:3] = torch.tensor([5, 5, 5])
    row_V = build_route_row(count_V, 3, 0, 0, "a")
    assert sorted(row_V[:3].tolist()) == [0, 1, 2]
    assert torch.bincount(row_V).tolist() == [100, 100, 100]


def test_layers_domains_and_seeds_differ():
    count_V = torch.arange(64)
    rows = [build_route_row(count_V, 4, *key) for key in ((0, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 0, "a"))]
    for i, row in enumerate(rows):
        for other in rows[:i]:
            assert 0.05 < float((row == other).double().mean()) < 0.6


def test_real_text_is_balanced_within_a_percent():
    count_V = 100_000 // torch.arange(1, 2001)
    load_E = loads(count_V, build_route_row(count_V, 4, 0, 0, "a"), 4)
    # Zipf's most frequent token weighs a seventh of the whole: less than an expert's share
    assert float(load_E.max() / load_E.double().mean()) < 1.01


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="token counts must not be negative"):
        build_route_row(torch.tensor([1, -1]), 2, 0, 0, "a")


def model(**router):
    config = ModelConfig(
        vocab_size=50,
        dim=4,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        expert_dim=2,
        sparse_layers="upper:2",
        router=RouterConfig(**router),
    )
    return Transformer(config, config.build_registry(("a", "b")))


def test_a_models_tables_are_filled_by_layer_and_domain():
    filled = model(name="rre", sets={"a": 2, "b": 3}, top_k=1, balance="none")
    counts = {"a": torch.arange(50), "b": torch.arange(50).flip(0)}
    fill_route_tables(filled, counts, 5)
    for layer in (1, 2):
        table = filled.model.layers[layer].block_sparse_moe.gate.route_table
        assert table.dtype == torch.int32
        assert torch.equal(table[0], build_route_row(counts["a"], 2, 5, layer, "a"))
        assert torch.equal(table[1], build_route_row(counts["b"], 3, 5, layer, "b"))


def test_learned_routers_have_no_table_to_fill():
    learned = model(name="domain_top_k", sets=2)
    for tensor in learned.state_dict().values():
        tensor.fill_(3)
    fill_route_tables(learned, {}, 0)
    assert all((tensor == 3).all() for tensor in learned.state_dict().values())
