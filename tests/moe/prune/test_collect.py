"""Sums of routers that transformers lacks (a selection bias, top-1, one domain); and watching changes nothing."""

import itertools

import pytest
import torch

from sigmoe.moe.batch import Batch
from sigmoe.moe.canonical import canonical_tensors
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.moe.prune.collect import Collector
from sigmoe.moe.routing import RoutingContext, group_by_domain
from sigmoe.moe.streaming import StreamedModel

SHAPE = {"vocab_size": 31, "dim": 14, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "expert_dim": 9}
ROUTERS = {
    "bias": RouterConfig(name="top_k", num_experts=5, balance="bias"),
    "bias, not renormalised": RouterConfig(name="top_k", num_experts=4, top_k=3, balance="bias", renormalize=False),
    "top-1": RouterConfig(name="top_k", num_experts=5, top_k=1, renormalize=False),
    "one domain": RouterConfig(name="domain_top_k", sets=5, balance="bias"),
    "as many as there are": RouterConfig(name="top_k", num_experts=3, top_k=3),
}


def layer_of(router):
    config = ModelConfig(**SHAPE, router=router, init_std=0.4)
    model = Transformer(config, config.build_registry(("any",))).requires_grad_(False)
    initialize(model, 0)
    for name, tensor in canonical_tensors(model).items():
        if name.endswith("bias"):
            tensor.copy_(torch.linspace(-0.3, 0.3, len(tensor)))
    return model.model.layers[0].block_sparse_moe


def watched(layer, x_BSD, *, subsets):
    """What a watched layer gives, and its sums; before it lies a residual stream of its own."""
    token_BS = torch.zeros(x_BSD.shape[:2], dtype=torch.int64)
    groups = group_by_domain(torch.zeros(len(token_BS), dtype=torch.int64))
    context = RoutingContext(token_BS=token_BS, groups=groups, index_T=torch.arange(token_BS.numel()), training=None)
    collector = Collector(layer.gate.config, subsets=subsets)
    routing = collector.route(layer.gate, x_BSD, context)
    rows_RD, count_E, receipt = layer.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
    rows_RD = layer.experts(rows_RD, count_E)
    out_BSD = layer.dispatcher.combine(rows_RD, receipt).view_as(x_BSD)
    collector.see(torch.ones_like(x_BSD), rows_RD, receipt, torch.ones_like(x_BSD) + out_BSD)
    return out_BSD, layer(x_BSD, context)[0], collector.sums


def over(layer, x_BSD, subset):
    """The layer's output where the gate has the experts `subset` alone, float64."""
    experts = torch.tensor(subset)
    place_BSK, weight_BSK = layer.gate.choose_alone(x_BSD, experts)
    routed = (x_BSD.flatten(0, 1), experts[place_BSK].flatten(0, 1), weight_BSK.flatten(0, 1))
    return layer.experts.extend(*routed).double()


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_each_subsets_error_is_that_of_the_layer_without_the_others(router):
    layer = layer_of(router)
    x_BSD = torch.randn(2, 19, SHAPE["dim"], generator=torch.Generator().manual_seed(1))
    _, _, sums = watched(layer, x_BSD, subsets=True)
    number = sums.num_experts
    whole_TD = over(layer, x_BSD, tuple(range(number)))
    for mask in range(1 << number):
        subset = [expert for expert in range(number) if mask >> expert & 1]
        if len(subset) < router.top_k:
            assert sums.subset_error[mask] == torch.inf
            continue
        expected = float((whole_TD - over(layer, x_BSD, subset)).square().sum())
        assert float(sums.subset_error[mask]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_subsets_change_no_other_sum_and_watching_no_output(router):
    layer = layer_of(router)
    x_BSD = torch.randn(3, 16, SHAPE["dim"], generator=torch.Generator().manual_seed(2))
    (few, plain, sums), (all_, _, wide) = (watched(layer, x_BSD, subsets=subsets) for subsets in (False, True))
    assert torch.equal(few, plain)
    assert (all_ - plain).abs().max() <= 1e-6 * plain.abs().max()
    assert sums.subset_error is None and torch.equal(sums.count_E, wide.count_E)
    assert int(sums.count_E.sum()) == 48 * router.top_k
    for name, tensor in sums.tensors().items():
        assert torch.allclose(tensor, wide.tensors()[name], rtol=1e-6, atol=0)


def test_what_points_the_same_way_turned_nothing():
    """cos = 1, and a zero stream, give no token's weight to `easy_ep`; a reversed one counts twice."""
    layer = layer_of(ROUTERS["top-1"])
    x_BSD = torch.randn(1, 4, SHAPE["dim"], generator=torch.Generator().manual_seed(3))
    context = RoutingContext(
        token_BS=torch.zeros(1, 4, dtype=torch.int64), groups=(), index_T=torch.arange(4), training=None
    )
    before_BSD = torch.randn_like(x_BSD)
    after_BSD = before_BSD * torch.tensor([3.0, 0.0, -2.0, 1.0])[None, :, None]
    collector = Collector(layer.gate.config, subsets=False)
    rows_RD, count_E, receipt = layer.dispatcher.dispatch(x_BSD[0], collector.route(layer.gate, x_BSD, context))
    rows_RD = layer.experts(rows_RD, count_E)
    collector.see(before_BSD, rows_RD, receipt, after_BSD)
    routing = layer.gate(x_BSD, context)
    norm = rows_RD[receipt.positions.row_TK[2, 0]].double().norm()
    expected_E = torch.zeros(5, dtype=torch.float64)
    expected_E[routing.expert_BSK[0, 2, 0]] = 2 * float(routing.weight_BSK[0, 2, 0]) * norm
    assert torch.allclose(collector.sums.easy_ep_E, expected_E, rtol=1e-12, atol=1e-12)


def test_a_batch_put_aside_between_layers_goes_on_with_the_same_bits(hf_model):
    _, model = hf_model("qwen3_moe")
    token_BS = torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(4))
    start_BS = torch.tensor([0] * 5 + [5] * 6).expand(2, -1)
    rest = {"label_BS": token_BS, "start_BS": start_BS, "domain_B": torch.zeros(2, dtype=torch.int64)}
    batch = Batch(token_BS=token_BS, sample_B=torch.arange(2), **rest)
    streamed = StreamedModel(model)
    (whole,) = streamed.run_layers([batch])
    (running,) = streamed.embed([batch])
    for layer in range(model.config.num_layers):
        running = streamed.resume(batch, running.x_BSD.clone())
        running.watcher = Collector(model.config.router, subsets=False)
        streamed.run_layer(layer, [running])
    assert torch.equal(running.x_BSD, whole.x_BSD)


def test_every_subset_is_there_once():
    layer = layer_of(ROUTERS["bias"])
    _, _, sums = watched(layer, torch.randn(1, 5, SHAPE["dim"]), subsets=True)
    allowed = {sum(1 << e for e in s) for k in range(2, 6) for s in itertools.combinations(range(5), k)}
    assert set(sums.subset_error.isfinite().nonzero().flatten().tolist()) == allowed
