import copy
import math

import pytest
import torch

from sigmoe.moe.canonical import canonical_tensors, canonical_views
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.moe.routing import TrainingPass
from sigmoe.parallel.engine import OptimizerConfig
from sigmoe.parallel.local import LocalEngine

DOMAIN = RouterConfig(name="domain_top_k", sets={"a": (0, 1, 2), "b": (2, 3)}, balance="bias", z_loss=0.01)
DOMAIN_B = torch.tensor([0, 1, 1, 0])


def build(**changes):
    shape = {"vocab_size": 31, "dim": 12, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    layers = {"expert_dim": 10, "sparse_layers": "upper:1", "qk_norm": "head", "init_std": 0.2}
    config = ModelConfig(**{**shape, **layers, "router": DOMAIN, **changes})
    model = Transformer(config, config.build_registry(("a", "b")))
    initialize(model, 0)
    return model


def loss_of(model, step=0, rows=slice(0, 4), scale=1.0):
    """Mean loss over a batch of 4 sequences, or the share of some of its `rows`."""
    torch.manual_seed(step)
    token_BS = torch.randint(31, (4, 9))
    output = model(
        token_BS[rows, :-1],
        domain_B=DOMAIN_B[rows],
        label_BS=token_BS[rows, 1:],
        training=TrainingPass(seed=0, step=step),
    )
    return scale * (output.loss_sum + 0.01 * output.stats[0].z_sum) / 32


def train(engine, steps, first=0):
    results = []
    for step in range(first, first + steps):
        engine.backward(loss_of(engine.model, step))
        results.append(engine.step(1e-2 / (step + 1)))
    return results


def snapshot(engine):
    """Every tensor of the state, copied: model, then optimizer."""
    state = engine.named_state()
    return [{name: tensor.read().clone() for name, tensor in part.items()} for part in (state.model, state.optimizer)]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


class Source:
    """Named tensors in memory."""

    def __init__(self, tensors):
        self.tensors = dict(tensors)

    def names(self):
        return self.tensors.keys()

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name):
        return self.tensors[name]


@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_equals_adamw_on_the_stacked_parameters(clip_norm):
    engine = LocalEngine(build(), OptimizerConfig(clip_norm=clip_norm, weight_decay=0.5, beta2=0.9, eps=1e-6))
    model = copy.deepcopy(engine.model)
    parameters = list(model.parameters())
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.5},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.9),
        eps=1e-6,
    )
    assert {p.dim() for p in parameters} == {1, 2, 3}
    for step in range(4):
        engine.backward(loss_of(engine.model, step))
        result = engine.step(1e-2 / (step + 1))
        plain.zero_grad()
        loss_of(model, step).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm)
        for group in plain.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        plain.step()
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert not result.skipped
        for (name, ours), theirs in zip(engine.model.named_parameters(), parameters):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_one_dimensional_parameters_do_not_decay():
    engine = LocalEngine(build(), OptimizerConfig(weight_decay=0.5))
    before = snapshot(engine)[0]
    assert engine.step(0.1).grad_norm == 0
    for name, tensor in snapshot(engine)[0].items():
        kept = tensor.dim() == 1
        torch.testing.assert_close(tensor, before[name] * (1 if kept else 1 - 0.1 * 0.5), msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_to_the_batch(dtype):
    whole, parts = (LocalEngine(build(), OptimizerConfig(clip_norm=None), dtype) for _ in range(2))
    whole.backward(loss_of(whole.model))
    for begin in range(4):
        parts.backward(loss_of(parts.model, rows=slice(begin, begin + 1)))
    norms = whole.step(1e-2).grad_norm, parts.step(1e-2).grad_norm
    tight = dtype == torch.float32
    assert norms[0] == pytest.approx(norms[1], rel=1e-5 if tight else 0.02)
    moments = [snapshot(engine)[1] for engine in (whole, parts)]
    for name, moment in moments[0].items():
        error = (moment - moments[1][name]).norm() / (moment.norm() + 1e-12)
        assert error < (1e-5 if tight else 0.1), name


def test_clipping_scales_gradients_to_the_norm():
    free = LocalEngine(build(), OptimizerConfig(clip_norm=None))
    clipped = LocalEngine(build(), OptimizerConfig(clip_norm=0.25))
    loose = LocalEngine(build(), OptimizerConfig(clip_norm=1e6))
    norms = [train(engine, 1)[0].grad_norm for engine in (free, clipped, loose)]
    assert norms[0] == norms[1] == norms[2] > 0.25
    first, second = (
        {name: tensor for name, tensor in snapshot(engine)[1].items() if name.endswith("exp_avg")}
        for engine in (free, clipped)
    )
    for name, moment in first.items():
        torch.testing.assert_close(second[name], moment * 0.25 / norms[0], rtol=1e-5, atol=1e-9)
    # the first moment after one step is a tenth of the gradient
    assert float(sum(m.square().sum() for m in second.values())) ** 0.5 == pytest.approx(0.025, rel=1e-5)
    assert_same(snapshot(free), snapshot(loose))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", ["nan loss", "inf loss", "nan gradient", "inf gradient", "nan in one of two"])
def test_a_step_that_is_not_finite_changes_no_bit(dtype, bad):
    engine = LocalEngine(build(), OptimizerConfig(), dtype)
    undisturbed = LocalEngine(build(), OptimizerConfig(), dtype)
    train(engine, 2)
    train(undisturbed, 2)
    before = snapshot(engine)
    value = math.nan if "nan" in bad else math.inf
    if "gradient" in bad:
        weight = engine.model.model.layers[1].block_sparse_moe.experts.down
        hook = weight.register_hook(
            lambda grad: grad.index_put((torch.tensor(2),) * 3, torch.tensor(value, dtype=grad.dtype))
        )
        engine.backward(loss_of(engine.model, 7))
        hook.remove()
    else:
        engine.backward(loss_of(engine.model, 7, scale=value))
        if "two" in bad:
            engine.backward(loss_of(engine.model, 8))
    result = engine.step(1e-2)
    assert result.skipped
    assert_same(before, snapshot(engine))
    assert train(engine, 2, first=2) == train(undisturbed, 2, first=2)
    assert_same(snapshot(engine), snapshot(undisturbed))


def is_of_domain_b(name):
    return ".experts.3." in name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_parameters_keep_every_bit(dtype):
    engine = LocalEngine(build(), OptimizerConfig(weight_decay=0.5), dtype)
    train(engine, 2)
    before = snapshot(engine)
    engine.train_only(is_of_domain_b)
    results = train(engine, 3, first=2)
    for old, new in zip(before, snapshot(engine)):
        moved = {name for name in new if not torch.equal(old[name], new[name])}
        assert moved == {name for name in new if is_of_domain_b(name)}
    assert snapshot(engine)[1]["model.layers.1.block_sparse_moe.experts.3.w1.weight.step"] == 5
    assert snapshot(engine)[1]["lm_head.weight.step"] == 2
    engine.train_only(lambda name: not is_of_domain_b(name))
    middle = snapshot(engine)
    rest = train(engine, 1, first=5)
    for old, new in zip(middle, snapshot(engine)):
        assert all(torch.equal(old[name], new[name]) for name in new if is_of_domain_b(name))
        assert not torch.equal(old[next(iter(old))], new[next(iter(new))])
    assert 0 < results[-1].grad_norm < rest[0].grad_norm


def test_the_norm_counts_what_trains_alone():
    engine = LocalEngine(build(), OptimizerConfig())
    engine.train_only(is_of_domain_b)
    engine.backward(loss_of(engine.model))
    gradients = {name: view for p, q in engine.model.named_parameters() for name, view in canonical_views(p, q.grad)}
    squares = sum(float(grad.double().square().sum()) for name, grad in gradients.items() if is_of_domain_b(name))
    assert engine.step(1e-2).grad_norm == pytest.approx(squares**0.5, rel=1e-6)


def test_freezing_everything_is_refused():
    engine = LocalEngine(build(), OptimizerConfig())
    with pytest.raises(ValueError, match="no parameter would train: widen the phase's train patterns"):
        engine.train_only(lambda name: False)
    assert not train(engine, 1)[0].skipped


def test_bf16_masters_keep_what_bf16_cannot():
    engine = LocalEngine(build(), OptimizerConfig(weight_decay=0.0), torch.bfloat16)
    gate = engine.model.model.layers[1].block_sparse_moe.gate.weight
    assert {p.dtype for p in engine.model.parameters() if p is not gate} == {torch.bfloat16}
    assert gate.dtype == torch.float32
    exact = canonical_tensors(build())
    before, rounded = snapshot(engine)[0], {n: t.clone() for n, t in canonical_tensors(engine.model).items()}
    for name, tensor in before.items():
        assert torch.equal(tensor, exact[name]), name
        assert torch.equal(rounded[name], tensor.to(rounded[name].dtype)), name
    engine.backward(loss_of(engine.model))
    engine.step(1e-6)
    after, published = snapshot(engine)[0], canonical_tensors(engine.model)
    name = "model.layers.1.self_attn.q_norm.weight"
    assert torch.equal(published[name], rounded[name])
    assert not torch.equal(after[name], before[name])
    assert float((after[name] - before[name]).abs().max()) < 2e-6
    for name, tensor in after.items():
        assert torch.equal(published[name], tensor.to(published[name].dtype)), name


def test_bf16_gradients_are_summed_in_fp32():
    engine = LocalEngine(build(), OptimizerConfig(clip_norm=None), torch.bfloat16)
    parameter = engine.model.lm_head.weight
    losses = [loss_of(engine.model, rows=slice(0, 2), scale=100.0), loss_of(engine.model, rows=slice(2, 4))]
    expected = sum(torch.autograd.grad(loss, parameter)[0].float() for loss in losses)
    assert not torch.equal(expected, expected.bfloat16().float())
    engine.backward(loss_of(engine.model, rows=slice(0, 2), scale=100.0))
    engine.backward(loss_of(engine.model, rows=slice(2, 4)))
    engine.step(1e-2)
    torch.testing.assert_close(snapshot(engine)[1]["lm_head.weight.exp_avg"], expected * 0.1, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_into_another_engine_bit_for_bit(dtype):
    engine, other = (LocalEngine(build(), OptimizerConfig(), dtype) for _ in range(2))
    train(engine, 2)
    engine.model.model.layers[1].block_sparse_moe.gate.e_score_correction_bias[1] = 0.125
    train(other, 1, first=9)
    state = snapshot(engine)
    assert {tensor.dtype for tensor in state[0].values()} == {torch.float32}
    other.load_named_state(Source(state[0]), Source(state[1]))
    assert_same(snapshot(other), state)
    assert_same([canonical_tensors(other.model)], [canonical_tensors(engine.model)])
    assert train(engine, 2, first=2) == train(other, 2, first=2)
    assert_same(snapshot(other), snapshot(engine))


def test_without_moments_training_starts_afresh():
    engine, fresh = (LocalEngine(build(), OptimizerConfig()) for _ in range(2))
    train(engine, 2)
    weights = snapshot(fresh)[0]
    engine.load_named_state(Source(weights), None)
    assert_same(snapshot(engine), snapshot(fresh))
    assert train(engine, 2) == train(fresh, 2)


@pytest.mark.parametrize("part", [0, 1])
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(part):
    engine = LocalEngine(build(), OptimizerConfig())
    train(engine, 1)
    state = snapshot(engine)
    name = "lm_head.weight" if part == 0 else "lm_head.weight.exp_avg_sq"
    without = {key: tensor for key, tensor in state[part].items() if key != name}
    cases = [
        (without, f"the checkpoint lacks {name}"),
        (
            {**state[part], name: torch.zeros(3, 12)},
            rf"{name} is \[3, 12\] in the checkpoint and \[31, 12\] in the model",
        ),
        ({**state[part], "model.more": torch.zeros(1)}, "the checkpoint holds model.more, the model does not"),
    ]
    for tensors, message in cases:
        sources = [Source({key: torch.ones_like(tensor) for key, tensor in half.items()}) for half in state]
        sources[part] = Source(tensors)
        with pytest.raises(ValueError, match=message):
            engine.load_named_state(*sources)
        assert_same(snapshot(engine), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr and eps must be above 0"),
        ({"eps": 0.0}, "lr and eps must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay not negative"),
        ({"beta1": 1.0}, r"beta1 and beta2 must lie in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, r"beta1 and beta2 must lie in \[0, 1\), got 0.9 and -0.1"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
    ],
)
def test_optimizer_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)
