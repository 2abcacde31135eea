"""ZeRO in any layout trains as one process does: loss, norm, first gradients and parameters; every moment is there."""

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from objective import watch_margins
from worlds import run_ranks
from zero_cases import (
    LENGTH,
    NAMES,
    SEQUENCES,
    STEPS,
    batch_of,
    gathered,
    labels_of,
    reloads,
    start,
    train_step,
    zero_cases,
)

from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.parallel.local import LocalEngine

ALL = [pytest.param(case, id=case.name) for world in (2, 4) for case in zero_cases(world)]


class Single:
    """A case's steps under LocalEngine."""

    def __init__(self, case):
        model = Transformer(case.config, case.config.build_registry(NAMES))
        initialize(model, 0)
        engine = LocalEngine(start(case, model), case.optim, getattr(torch, case.dtype))
        self.margin, self.losses, self.norms, self.skipped = watch_margins(model), [], [], []
        for step in range(STEPS):
            whole = batch_of(case, step)
            labels, tokens = labels_of(whole), whole.token_BS.numel()
            poisoned = step == 1 and case.poison is not None
            if step == 0:
                gradients = watch_gradients(engine)
            loss, result = train_step(case, model, engine, [whole], labels, tokens, step, poisoned=poisoned)
            self.losses.append(loss)
            self.norms.append(result.grad_norm)
            self.skipped.append(result.skipped)
        state = engine.named_state()
        self.tensors = {
            "gradient": gradients,
            "model": {name: tensor.read() for name, tensor in state.model.items()},
            "optimizer": {name: tensor.read() for name, tensor in state.optimizer.items()},
        }


def watch_gradients(engine):
    kept, read = {}, engine._canonical_gradients

    def watched():
        gradients = read()
        if not kept:
            kept.update({name: gradient.clone() for name, gradient in gradients.items()})
        return gradients

    engine._canonical_gradients = watched
    return kept


@cache
def single(key):
    """Run in one process what cases of this key have in common."""
    return Single(next(case for world in (2, 4) for case in zero_cases(world) if case.key == key))


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Train all cases of a world size, once; returns the folder of their results."""
    pytest.importorskip("deepspeed")
    pytest.importorskip("megatron.core")

    @cache
    def started(world):
        folder = tmp_path_factory.mktemp(f"zero{world}")
        return folder, run_ranks("zero_world.py", world, folder)

    def run_once(world):
        folder, wrong = started(world)
        assert wrong is None, wrong
        return folder

    return run_once


@pytest.fixture
def ranks(run):
    """Read what every rank of a case wrote."""

    return lambda case: read(run(case.world), f"zero{zero_cases(case.world).index(case)}", case.world)


def read(folder, stem, world):
    paths = [folder / f"{stem}-{rank}" for rank in range(world)]
    return [(json.loads(Path(f"{path}.json").read_text()), load_file(f"{path}.safetensors")) for path in paths]


@pytest.mark.parametrize("case", ALL)
def test_training_equals_one_process(case, ranks):
    one, results = single(case.key), ranks(case)
    exact = case.dtype != "bfloat16"
    assert one.margin[0] > 1e-4 or not exact
    close = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1e-3}[case.dtype]
    # Products of a part of the width are rounded to bf16 before they are added up, gradients a micro-batch at a time.
    norm_close = close if exact else 3e-3
    losses = [sum(a["losses"][s] for a, _ in results if a["counts_once"]) for s in range(STEPS)]
    if case.poison is None:  # otherwise a norm is no number, and unequal to itself
        assert all(answer["norms"] == results[0][0]["norms"] for answer, _ in results)
    assert all(answer["skipped"][:STEPS] == one.skipped for answer, _ in results)
    for step in range(STEPS):
        if one.skipped[step]:
            continue
        assert losses[step] == pytest.approx(one.losses[step], rel=close)
        assert results[0][0]["norms"][step] == pytest.approx(one.norms[step], rel=norm_close)
    assert all(answer["published"] for answer, _ in results)
    limits = {"gradient": close if exact else 2e-2, "model": 100 * close if exact else 1e-2, "optimizer": None}
    for kind, limit in limits.items():
        tensors = gathered(results, kind)
        assert tensors.keys() == one.tensors[kind].keys()
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in one.tensors[kind].items()
        }
        if limit is not None:
            far = {name: error(tensors[name], one.tensors[kind][name]) for name in tensors}
            assert {name: value for name, value in far.items() if not value <= limit} == {}
    steps = {name: float(t) for name, t in gathered(results, "optimizer").items() if name.endswith(".step")}
    assert steps == {name: float(t) for name, t in one.tensors["optimizer"].items() if name.endswith(".step")}


@pytest.mark.parametrize(
    ("source", "case"),
    [pytest.param(*pair, id=f"{pair[0].name}-to-{pair[1].name}") for world in (2, 4) for pair in reloads(world)],
)
def test_a_state_goes_on_under_any_layout(source, case, ranks, run):
    before = ranks(source)
    number = reloads(case.world).index((source, case))
    after = read(run(case.world), f"reload{number}", case.world)
    for kind in ("model", "optimizer"):
        saved, loaded = (gathered(results, kind) for results in (before, after))
        assert saved.keys() == loaded.keys()
        assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []
    assert all(answer["published"] for answer, _ in after)
    assert all(answer["elements_read"] <= answer["elements_wanted"] for answer, _ in after)
    there, here = gathered(before, "next"), gathered(after, "next")
    if source == case:
        assert [name for name in there if not torch.equal(there[name], here[name])] == []
        assert before[0][0]["norms"][STEPS] == after[0][0]["norms"][0]
    elif case.dtype == "float32":
        assert {name: error(here[name], there[name]) for name in there if error(here[name], there[name]) > 1e-4} == {}
        assert after[0][0]["norms"][0] == pytest.approx(before[0][0]["norms"][STEPS], rel=1e-6)


@pytest.mark.parametrize("case", ALL)
def test_bytes_are_those_of_the_formulas(case, ranks):
    for answer, _ in ranks(case):
        for name, formula in answer["footprint"].items():
            held = answer["held_bytes"][name]
            # One copies what all tensor ranks hold alike; steps, and on rank 0 buffers, come on top.
            if name == "snapshot" and case.parallel.tp > 1:
                assert 0.5 * formula < held < 1.05 * formula
            else:
                assert held == pytest.approx(formula, rel=0.02), name
        assert answer["sent"] == answer["traffic"]


@pytest.mark.parametrize("case", ALL)
def test_every_routed_row_is_sent_once(case, ranks):
    """Over all processes: tokens times top-k less what is dropped, for each process that holds a part of an expert."""
    results, router = ranks(case), case.config.router
    parts = case.parallel.expert_tp
    for layer in map(str, case.config.sparse_layer_ids):
        rows = [[sum(column) for column in zip(*(micro[layer] for micro in a["rows"]))] for a, _ in results]
        sent, received = (sum(row[place] for row in rows) for place in (0, 1))
        dropped = sum(row[2] for row, (answer, _) in zip(rows, results) if answer["counts_once"])
        assert sent == received == parts * (SEQUENCES * LENGTH * router.top_k - dropped)
        assert (dropped > 0) == (router.capacity_factor is not None)


def test_the_hard_cases_are_as_hard_as_they_say(ranks):
    """They train as one process does, see above; here: one expert, and one rank, get nothing; one rank has padding."""
    hard = [case for world in (2, 4) for case in zero_cases(world) if case.starved or case.padding]
    assert len(hard) >= 4
    for case in hard:
        results = ranks(case)
        gradients = gathered(results, "gradient")
        for layer in case.config.sparse_layer_ids:
            for expert in case.starved:
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"
                assert not bool(gradients[name].any())
            if len(case.starved) > 1:
                assert [micro[str(layer)][1] for micro in results[0][0]["rows"]] == [0, 0]
        if case.padding:
            mine = batch_of(case, STEPS - 1).rows(0, SEQUENCES // 2)
            assert labels_of(mine) == 0


def error(ours, theirs):
    """Norm-relative distance; where the truth is zero, the distance itself."""
    scale = float(theirs.double().norm())
    return float((ours.double() - theirs.double()).norm()) / (scale if scale > 0 else 1.0)
