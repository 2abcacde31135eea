import math

import pytest
import torch

from sigmoe.moe.balance import uniform_fractions
from sigmoe.moe.config import RouterConfig
from sigmoe.moe.dispatch import LocalDispatcher
from sigmoe.moe.routers import build_router
from sigmoe.moe.routing import RoutingContext, TrainingPass, group_by_domain

B, S, D, V = 5, 7, 6, 13
DOMAIN_B = torch.tensor([2, 0, 1, 0, 2])
DISJOINT = ((0, 1, 2), (3, 4), (5, 6, 7, 8))
OVERLAPPING = ((0, 1, 2), (2, 3), (0, 2, 3, 4))


def router(name="domain_top_k", sets=DISJOINT, seed=0, **changes):
    """A router with random gate weights (or table)."""
    counts = {"num_experts": 1 + max(map(max, sets))} if name == "top_k" else {"sets": 1}
    if name == "rre":
        changes = {"top_k": 1, "balance": "none", **changes}
    built = build_router(RouterConfig(name=name, **counts, **changes), 4, D, V, sets)
    torch.manual_seed(seed)
    with torch.no_grad():
        if name == "rre":
            for row, experts in enumerate(sets):
                built.route_table[row] = torch.randint(len(experts), (V,), dtype=torch.int32)
        else:
            built.weight.normal_()
    return built


def inputs(seed=1, batch=B):
    torch.manual_seed(seed)
    return torch.randn(batch, S, D), torch.randint(V, (batch, S))


def route(built, x_BSD, token_BS, domain_B=DOMAIN_B, training=None, sample_B=None):
    sample_B = torch.arange(x_BSD.shape[0]) if sample_B is None else sample_B
    context = RoutingContext(
        token_BS=token_BS,
        groups=group_by_domain(domain_B),
        index_T=(sample_B[:, None] * S + torch.arange(S)).flatten(),
        training=training,
    )
    return built(x_BSD, context)


def training(step=0, fractions=None, seed=3):
    return TrainingPass(seed=seed, step=step, fractions=fractions or {})


def in_words(routing):
    return {name: getattr(routing, name) for name in ("expert_BSK", "weight_BSK", "count_BE", "balance_sum", "z_sum")}


def logits_of(built, x_BSD, b, experts):
    """fp64 logits of sequence b over `experts`."""
    return x_BSD[b].double() @ built.weight.detach().double()[list(experts)].T


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("renormalize", [True, False])
def test_global_gate_by_hand(top_k, renormalize):
    built = router("top_k", top_k=top_k, renormalize=renormalize)
    x_BSD, token_BS = inputs()
    routing = route(built, x_BSD, token_BS, None)
    for b in range(B):
        prob_SE = logits_of(built, x_BSD, b, range(9)).softmax(-1)
        weight_SK, expert_SK = prob_SE.topk(top_k)
        if renormalize:
            weight_SK = weight_SK / weight_SK.sum(-1, keepdim=True)
        assert torch.equal(routing.expert_BSK[b], expert_SK)
        torch.testing.assert_close(routing.weight_BSK[b].double(), weight_SK, rtol=1e-5, atol=1e-6)
        assert torch.equal(routing.count_BE[b], torch.bincount(expert_SK.flatten(), minlength=9))
    assert routing.weight_BSK.dtype == torch.float32
    assert routing.num_experts == 9
    assert routing.capacity_B is None


def test_ties_go_to_the_lower_id():
    built = router("top_k", sets=((0, 1, 2, 3),))
    with torch.no_grad():
        built.weight[1:] = built.weight[3]
    x_BSD, token_BS = inputs()
    expert_BSK = route(built, x_BSD, token_BS, None).expert_BSK
    assert {tuple(pair) for pair in expert_BSK.flatten(0, 1).tolist()} == {(0, 1), (1, 2)}


@pytest.mark.parametrize("sets", [DISJOINT, OVERLAPPING])
@pytest.mark.parametrize("top_k", [1, 2])
def test_domain_gate_by_hand_never_leaves_the_set(sets, top_k):
    built = router(sets=sets, top_k=top_k)
    x_BSD, token_BS = inputs()
    routing = route(built, x_BSD, token_BS)
    for b, domain in enumerate(DOMAIN_B.tolist()):
        weight_SK, place_SK = logits_of(built, x_BSD, b, sets[domain]).softmax(-1).topk(top_k)
        expert_SK = torch.tensor(sets[domain])[place_SK]
        assert set(routing.expert_BSK[b].flatten().tolist()) <= set(sets[domain])
        assert torch.equal(routing.expert_BSK[b], expert_SK)
        expected = weight_SK / weight_SK.sum(-1, keepdim=True)
        torch.testing.assert_close(routing.weight_BSK[b].double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(routing.count_BE[b], torch.bincount(expert_SK.flatten(), minlength=built.num_experts))


def test_rre_is_a_look_up():
    built = router("rre", sets=OVERLAPPING)
    x_BSD, token_BS = inputs()
    routing = route(built, x_BSD, token_BS)
    for b, domain in enumerate(DOMAIN_B.tolist()):
        for s, token in enumerate(token_BS[b].tolist()):
            assert int(routing.expert_BSK[b, s, 0]) == OVERLAPPING[domain][int(built.route_table[domain, token])]
        assert torch.equal(routing.count_BE[b], torch.bincount(routing.expert_BSK[b].flatten(), minlength=5))
    assert torch.equal(routing.weight_BSK, torch.ones(B, S, 1))
    assert routing.balance_sum.item() == routing.z_sum.item() == 0
    assert not list(built.parameters())


@pytest.mark.parametrize("name", ["domain_top_k", "rre"])
@pytest.mark.parametrize("sets", [DISJOINT, OVERLAPPING])
def test_mixed_batch_equals_each_domain_alone(name, sets):
    built = router(name, sets)
    x_BSD, token_BS = inputs()
    mixed = route(built, x_BSD, token_BS, training=training())
    balance_sum = z_sum = 0.0
    for domain in range(3):
        rows = DOMAIN_B.eq(domain).nonzero().flatten()
        alone = route(built, x_BSD[rows], token_BS[rows], DOMAIN_B[rows], training=training())
        assert torch.equal(mixed.expert_BSK[rows], alone.expert_BSK)
        assert torch.equal(mixed.count_BE[rows], alone.count_BE)
        torch.testing.assert_close(mixed.weight_BSK[rows], alone.weight_BSK)
        balance_sum, z_sum = balance_sum + alone.balance_sum, z_sum + alone.z_sum
    torch.testing.assert_close(mixed.balance_sum, torch.as_tensor(balance_sum))
    torch.testing.assert_close(mixed.z_sum, torch.as_tensor(z_sum))


def test_overlapping_sets_share_gate_rows():
    built = router(sets=OVERLAPPING)
    x_BSD, token_BS = inputs()
    assert built.weight.shape == (5, D)
    route(built, x_BSD[:1], token_BS[:1], torch.tensor([1])).weight_BSK[..., 0].sum().backward()
    moved = built.weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [False, False, True, True, False]


def test_set_of_one_has_weight_one():
    built = router(sets=((0,), (1,), (2, 3)), top_k=1, renormalize=False)
    x_BSD, token_BS = inputs()
    routing = route(built, 50 * x_BSD, token_BS)
    single = DOMAIN_B < 2
    assert torch.equal(routing.weight_BSK[single], torch.ones(3, S, 1))
    assert torch.equal(routing.expert_BSK[single, :, 0], DOMAIN_B[single, None].expand(3, S))


def test_z_sum_by_hand():
    x_BSD, token_BS = inputs()
    built = router()
    expected = sum(logits_of(built, x_BSD, b, DISJOINT[d]).logsumexp(-1).square().sum() for b, d in enumerate(DOMAIN_B))
    assert route(built, x_BSD, token_BS).z_sum.item() == pytest.approx(float(expected), rel=1e-5)
    whole = router("top_k")
    expected = sum(logits_of(whole, x_BSD, b, range(9)).logsumexp(-1).square().sum() for b in range(B))
    assert route(whole, x_BSD, token_BS).z_sum.item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("name", "sets"), [("top_k", (tuple(range(9)),)), ("domain_top_k", DISJOINT)])
@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_balance_sum_by_hand(name, sets, scope):
    built = router(name, balance_scope=scope)
    x_BSD, token_BS = inputs()
    torch.manual_seed(2)
    fraction_NE = torch.rand(len(sets), 9)
    routing = route(built, x_BSD, token_BS, training=training(fractions={4: fraction_NE}))
    expected = 0.0
    for b, domain in enumerate(DOMAIN_B.tolist()):
        group = domain if name == "domain_top_k" else 0
        experts = list(sets[group])
        prob_E = logits_of(built, x_BSD, b, experts).softmax(-1).sum(0)
        share_E = routing.count_BE[b, experts].double() / (2 * S)
        fraction_E = share_E if scope == "sequence" else fraction_NE[group, experts].double()
        expected += float(len(experts) * (fraction_E * prob_E).sum())
    assert routing.balance_sum.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["top_k", "domain_top_k"])
def test_uniform_fractions_and_any_gate_give_one_a_token(name):
    built = router(name, balance_scope="batch")
    sets = DISJOINT if name == "domain_top_k" else (tuple(range(9)),)
    x_BSD, token_BS = inputs()
    routing = route(built, x_BSD, token_BS, training=training(fractions={4: uniform_fractions(sets, 9)}))
    assert routing.balance_sum.item() == pytest.approx(B * S, rel=1e-5)


def test_no_balance_loss_where_none_is_asked_for():
    x_BSD, token_BS = inputs()
    assert float(route(router(), x_BSD, token_BS).balance_sum) == 0
    for balance in ("none", "bias"):
        routing = route(router(balance=balance), x_BSD, token_BS, training=training())
        assert routing.balance_sum.item() == 0


def test_gradients_of_the_sums_reach_the_gate():
    built = router(top_k=1, renormalize=False)
    x_BSD, token_BS = inputs()
    for name in ("balance_sum", "z_sum"):
        built.weight.grad = None
        getattr(route(built, x_BSD, token_BS, training=training()), name).backward()
        assert (built.weight.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", ["top_k", "domain_top_k"])
def test_jitter_acts_in_training_only(name):
    x_BSD, token_BS = inputs()
    still, shaken = router(name), router(name, jitter=0.5)
    for left, right in zip(*(in_words(route(r, x_BSD, token_BS)).values() for r in (still, shaken))):
        assert torch.equal(left, right)
    weight_BSK = route(shaken, x_BSD, token_BS, training=training()).weight_BSK
    assert not torch.equal(weight_BSK, route(still, x_BSD, token_BS, training=training()).weight_BSK)


def test_jitter_is_keyed_by_sample_and_step_not_by_place():
    built = router(jitter=0.5)
    x_BSD, token_BS = inputs()
    sample_B, order = torch.tensor([9, 4, 7, 0, 2]), torch.tensor([3, 0, 4, 2, 1])
    here = route(built, x_BSD, token_BS, training=training(), sample_B=sample_B)
    there = route(built, x_BSD[order], token_BS[order], DOMAIN_B[order], training=training(), sample_B=sample_B[order])
    torch.testing.assert_close(there.weight_BSK, here.weight_BSK[order])
    assert torch.equal(there.expert_BSK, here.expert_BSK[order])
    for other in (
        route(built, x_BSD, token_BS, training=training(step=1), sample_B=sample_B),
        route(built, x_BSD, token_BS, training=training(seed=4), sample_B=sample_B),
        route(built, x_BSD, token_BS, training=training(), sample_B=sample_B + 1),
    ):
        assert not torch.equal(other.weight_BSK, here.weight_BSK)


def test_jitter_differs_by_layer_and_stays_in_its_band():
    config = RouterConfig(name="top_k", num_experts=9, jitter=0.25)
    x_BSD, token_BS = inputs()
    context = RoutingContext(token_BS=token_BS, groups=(), index_T=torch.arange(B * S), training=training())
    factor, other = (
        build_router(config, layer, D, V, (tuple(range(9)),)).jittered(x_BSD, context) / x_BSD for layer in (4, 5)
    )
    assert factor.min() >= 0.75 - 1e-6
    assert factor.max() <= 1.25 + 1e-6
    assert abs(float(factor.mean()) - 1) < 0.03
    assert not torch.equal(factor, other)


@pytest.mark.parametrize("name", ["top_k", "domain_top_k", "rre"])
def test_capacity_acts_in_training_only_and_follows_the_set(name):
    built = router(name, capacity_factor=0.75)
    x_BSD, token_BS = inputs()
    assert route(built, x_BSD, token_BS).capacity_B is None
    routing = route(built, x_BSD, token_BS, training=training())
    top_k = 1 if name == "rre" else 2
    sizes = [9] * B if name == "top_k" else [len(DISJOINT[d]) for d in DOMAIN_B.tolist()]
    assert routing.capacity_B.tolist() == [math.ceil(0.75 * top_k * S / size) for size in sizes]
    dispatcher = LocalDispatcher()
    rows_RD, count_E, receipt = dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
    over = sum(
        max(count - capacity, 0)
        for row, capacity in zip(routing.count_BE.tolist(), routing.capacity_B.tolist())
        for count in row
    )
    assert int(dispatcher.dropped(receipt)) == over > 0
    assert rows_RD.shape[0] == int(count_E.sum()) == B * S * top_k - over
    assert int(routing.count_BE.sum()) == B * S * top_k


@pytest.mark.parametrize("renormalize", [True, False])
def test_selection_bias_moves_the_choice_but_not_the_formula(renormalize):
    built = router(balance="bias", renormalize=renormalize)
    x_BSD, token_BS = inputs()
    before = route(built, x_BSD, token_BS)
    built.e_score_correction_bias[8] = 2.0
    built.e_score_correction_bias[0] = -2.0
    after = route(built, x_BSD, token_BS)
    for b, domain in enumerate(DOMAIN_B.tolist()):
        prob_SE = torch.zeros(S, 9, dtype=torch.float64)
        prob_SE[:, list(DISJOINT[domain])] = logits_of(built, x_BSD, b, DISJOINT[domain]).softmax(-1)
        weight_SK = prob_SE.gather(1, after.expert_BSK[b])
        if renormalize:
            weight_SK = weight_SK / weight_SK.sum(-1, keepdim=True)
        torch.testing.assert_close(after.weight_BSK[b].double(), weight_SK, rtol=1e-5, atol=1e-6)
        chosen = [set(pair) for pair in after.expert_BSK[b].tolist()]
        assert all(8 in pair for pair in chosen) if domain == 2 else all(0 not in pair for pair in chosen)
    assert torch.equal(before.expert_BSK[2], after.expert_BSK[2])
    assert torch.equal(before.z_sum, after.z_sum)


def test_router_works_in_fp32_whatever_comes_in():
    built = router()
    x_BSD, token_BS = inputs()
    narrow = route(built, x_BSD.bfloat16(), token_BS)
    exact = route(built, x_BSD.bfloat16().float(), token_BS)
    assert narrow.weight_BSK.dtype == torch.float32
    assert torch.equal(narrow.weight_BSK, exact.weight_BSK)
