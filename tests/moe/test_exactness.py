"""A submodel cut out by hand computes the full model's bits: the ground that exact extraction stands on."""

import dataclasses

import pytest
import torch

from sigmoe.moe.canonical import canonical_tensors, expert_of
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.moe.route_table import fill_route_tables

NAMES = ("a", "b", "c")
SETS = {
    "disjoint": {"a": 3, "b": 2, "c": 5},
    "overlapping": {"a": (0, 1, 2), "b": (1, 3), "c": (0, 2, 3, 4)},
    "by layer": {"a": ((0, 1, 2), (1, 4)), "b": ((2, 3), (0, 1, 2, 3)), "c": ((1, 3, 4), (0, 4))},
}
SHAPES = [(1, 1), (1, 7), (2, 33), (5, 3), (3, 13)]


def build(router, **changes):
    # dim * expert_dim is no multiple of 4: an expert lies aligned differently in the submodel's stack, and the bits of
    # a product with one or two rows would show it. The init_std lets routing vary by token.
    shape = {"vocab_size": 53, "dim": 22, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "head_dim": 6}
    layers = {"sparse_layers": "upper:2", "expert_dim": 19, "ffn_dim": 18, "init_std": 0.3}
    config = ModelConfig(**{**shape, **layers, "router": router, **changes})
    model = Transformer(config, config.build_registry(NAMES))
    initialize(model, 0)
    torch.manual_seed(0)
    fill_route_tables(model, {name: torch.randint(0, 9, (53,)) for name in NAMES}, 0)
    return model


def cut_out(full, name):
    """A model of one domain, its tensors picked from the full model's by canonical name."""
    domain = full.registry.domains[full.registry.id_of(name)]
    config = dataclasses.replace(
        full.config,
        embedding_slots={},
        router=dataclasses.replace(
            full.config.router, sets={name: tuple(tuple(range(len(experts))) for experts in domain.experts)}
        ),
    )
    sub = Transformer(config, config.build_registry((name,)))
    source = canonical_tensors(full)
    for key, target in canonical_tensors(sub).items():
        target.copy_(pick(full, domain, key, source))
    return sub


def pick(full, domain, key, source):
    found = expert_of(key)
    if found is not None:
        layer, expert = found
        kept = domain.experts[full.config.sparse_layer_ids.index(layer)][expert]
        return source[key.replace(f"experts.{expert}.", f"experts.{kept}.")]
    if "block_sparse_moe.gate" in key:
        layer = int(key.split(".")[2])
        kept = list(domain.experts[full.config.sparse_layer_ids.index(layer)])
        return source[key][domain.id : domain.id + 1] if key.endswith("route_table") else source[key][kept]
    if full.config.num_slots > 1 and key in ("model.embed_tokens.weight", "lm_head.weight"):
        return source[key.replace("weight", f"slots.{domain.slot}.weight")]
    return source[key]


def assert_bits_equal(full, sub, name, shape):
    batch, length = shape
    torch.manual_seed(length)
    token_BS = torch.randint(53, shape)
    start_BS = torch.zeros(shape, dtype=torch.int64)
    start_BS[:, length // 2 :] = length // 2
    whole = full(token_BS, start_BS=start_BS, domain_B=torch.full((batch,), full.registry.id_of(name)))
    alone = sub(token_BS, start_BS=start_BS, domain_B=torch.zeros(batch, dtype=torch.int64))
    assert torch.equal(whole.logits_BSV, alone.logits_BSV)
    assert whole.logits_BSV.isfinite().all()


@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
@pytest.mark.parametrize("router", ["domain_top_k", "rre"])
@pytest.mark.parametrize(
    "changes", [{}, {"embedding_slots": {"a": 1, "c": 2}}, {"embedding_slots": {"b": 1}, "tie_embeddings": True}]
)
@torch.no_grad()
def test_submodel_gives_the_same_bits(router, sets, changes):
    gate = {"top_k": 1, "balance": "none"} if router == "rre" else {}
    full = build(RouterConfig(name=router, sets=sets, **gate), **changes)
    for name in NAMES:
        sub = cut_out(full, name)
        for shape in SHAPES:
            assert_bits_equal(full, sub, name, shape)


@pytest.mark.parametrize("changes", [{"qk_norm": "head"}, {"qk_norm": "width", "sliding_window": 4}])
@torch.no_grad()
def test_with_norms_windows_and_a_selection_bias(changes):
    full = build(RouterConfig(name="domain_top_k", sets=SETS["overlapping"], balance="bias"), **changes)
    for key, tensor in canonical_tensors(full).items():
        if key.endswith("bias"):
            tensor.normal_(std=0.2)
    for name in NAMES:
        sub = cut_out(full, name)
        for shape in SHAPES:
            assert_bits_equal(full, sub, name, shape)


@torch.no_grad()
def test_sets_of_one():
    full = build(RouterConfig(name="domain_top_k", sets=1, top_k=1))
    for name in NAMES:
        assert_bits_equal(full, cut_out(full, name), name, (2, 9))


@torch.no_grad()
def test_in_bf16():
    full = build(RouterConfig(name="domain_top_k", sets=SETS["disjoint"])).bfloat16()
    for name in NAMES:
        assert_bits_equal(full, cut_out(full, name).bfloat16(), name, (2, 9))


@torch.no_grad()
def test_a_wrong_expert_is_noticed():
    full = build(RouterConfig(name="domain_top_k", sets=SETS["disjoint"]))
    sub = cut_out(full, "c")
    canonical_tensors(sub)["model.layers.2.block_sparse_moe.experts.1.w2.weight"][0, 0] += 1e-3
    with pytest.raises(AssertionError):
        assert_bits_equal(full, sub, "c", (2, 33))
