import pytest
import torch

from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.counts import count_parameters, train_flops
from sigmoe.moe.model import Transformer

SHAPE = {"vocab_size": 11, "dim": 6, "num_layers": 3, "num_heads": 3, "num_kv_heads": 1, "head_dim": 4}
GLOBAL = RouterConfig(name="top_k", num_experts=4)
DOMAIN = RouterConfig(name="domain_top_k", sets={"a": (0, 1), "b": (1, 2, 3)})
TABLE = RouterConfig(name="rre", sets={"a": (0, 1), "b": (1, 2, 3)}, top_k=1, balance="none")


def model(router=GLOBAL, **changes):
    config = ModelConfig(
        **{**SHAPE, "expert_dim": 5, "ffn_dim": 7, "sparse_layers": "upper:2", "router": router, **changes}
    )
    return config, config.build_registry(("a", "b"))


@pytest.mark.parametrize("router", [GLOBAL, DOMAIN, TABLE], ids=lambda router: router.name)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparse_layers": "none"},
        {"sparse_layers": "every:2", "ffn_dim": None},
        {"qk_norm": "head"},
        {"qk_norm": "width", "num_kv_heads": 3},
        {"tie_embeddings": True},
        {"embedding_slots": {"b": 1}},
        {"embedding_slots": {"a": 1}, "tie_embeddings": True, "head_dim": None, "sliding_window": 3},
    ],
)
def test_total_is_the_sum_over_the_real_model(router, changes):
    config, registry = model(router, **changes)
    with torch.device("meta"):
        real = Transformer(config, registry)
    assert count_parameters(config, registry).total == sum(p.numel() for p in real.parameters())


def test_total_counts_layers_whose_experts_differ_in_number():
    config, registry = model(RouterConfig(name="domain_top_k", sets={"a": ((0, 1), (0, 2)), "b": ((1, 2, 3), (0, 1))}))
    with torch.device("meta"):
        real = Transformer(config, registry)
    assert count_parameters(config, registry).total == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize(
    ("router", "changes", "total", "active"),
    [
        # embedding and head 2*66, projections 3*192, norms 3*12 + 6, dense 126, 2 layers of 4*90 experts and 24 gate
        (GLOBAL, {}, 132 + 576 + 42 + 126 + 2 * 384, 132 + 576 + 42 + 126 + 2 * (180 + 24)),
        # a token sees its domain's gate rows: 2 or 3 of 6 weights
        (DOMAIN, {}, 132 + 576 + 42 + 126 + 2 * 384, 132 + 576 + 42 + 126 + 2 * (180 + 15)),
        (TABLE, {}, 132 + 576 + 42 + 126 + 2 * 360, 132 + 576 + 42 + 126 + 2 * 90),
        (
            GLOBAL,
            {"embedding_slots": {"b": 1}, "tie_embeddings": True, "qk_norm": "head"},
            2 * 66 + 3 * (192 + 8) + 42 + 126 + 2 * 384,
            66 + 3 * (192 + 8) + 42 + 126 + 2 * 204,
        ),
        (GLOBAL, {"sparse_layers": "none"}, 132 + 576 + 42 + 3 * 126, 132 + 576 + 42 + 3 * 126),
    ],
)
def test_parameters_by_hand(router, changes, total, active):
    counted = count_parameters(*model(router, **changes))
    assert (counted.total, counted.active) == (total, active)


@pytest.mark.parametrize(
    ("router", "window", "flops"),
    [
        # weights of products: 3*192 projections, 66 head, 126 dense, 2 layers of 180 experts and 24 gate: 1176 in all.
        # attention: 3 layers of 4 flops times 3 heads of 4, and 1+2+...+10 = 55 pairs for 10 tokens
        (GLOBAL, None, 3 * (2 * 1176 + 3 * 48 * 5.5)),
        (DOMAIN, None, 3 * (2 * (1176 - 2 * 24 + 2 * 15) + 3 * 48 * 5.5)),
        (TABLE, None, 3 * (2 * (576 + 66 + 126 + 2 * 90) + 3 * 48 * 5.5)),
        (GLOBAL, 4, 3 * (2 * 1176 + 3 * 48 * (1 + 2 + 3 + 7 * 4) / 10)),
        (GLOBAL, 10, 3 * (2 * 1176 + 3 * 48 * 5.5)),
        (GLOBAL, 99, 3 * (2 * 1176 + 3 * 48 * 5.5)),
        (GLOBAL, 1, 3 * (2 * 1176 + 3 * 48)),
    ],
)
def test_flops_by_hand(router, window, flops):
    config, registry = model(router, sliding_window=window)
    assert train_flops(config, registry, 10) == pytest.approx(flops, rel=1e-12)


def test_flops_of_a_dense_model_with_slots_count_one_head():
    config, registry = model(sparse_layers="none", embedding_slots={"b": 1}, tie_embeddings=True)
    assert train_flops(config, registry, 1) == 3 * (2 * (576 + 66 + 3 * 126) + 3 * 48)
