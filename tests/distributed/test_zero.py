"""ZeRO in any layout trains as one process does: loss, norm, first gradients, parameters and moments."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from zero_cases import NAMES, STEPS, batch_of, gathered, labels_of, reloads, start, train_step, zero_cases

from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.moe.routers import LearnedGate
from sigmoe.parallel.config import ParallelConfig
from sigmoe.parallel.local import LocalEngine

ALL = [pytest.param(case, id=case.name) for world in (2, 4) for case in zero_cases(world)]


def watch_margins(model):
    """Let every gate note the least distance between the last expert chosen and the first that is not."""
    margins = [float("inf")]

    def watch(gate):
        choose, last = gate.choose, gate.config.top_k

        def watched(x_BSD, experts):
            logits, bias = gate._logits(x_BSD.detach(), experts)
            score = logits.detach().softmax(-1) + (0 if bias is None else bias)
            if last < score.shape[-1]:
                ordered = score.sort(-1, descending=True).values
                margins[0] = min(margins[0], float((ordered[..., last - 1] - ordered[..., last]).min()))
            return choose(x_BSD, experts)

        gate.choose = watched

    for module in model.modules():
        if isinstance(module, LearnedGate):
            watch(module)
    return margins


class Single:
    """A case's steps under LocalEngine."""

    def __init__(self, case):
        model = Transformer(case.config, case.config.build_registry(NAMES))
        initialize(model, 0)
        engine = LocalEngine(start(model), case.optim, getattr(torch, case.dtype))
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
        program = Path(__file__).with_name("zero_world.py")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        ranks = []
        for rank in range(world):
            command = [sys.executable, str(program), str(rank), str(world), str(folder)]
            with (folder / f"words{rank}").open("w") as words:
                ranks.append(subprocess.Popen(command, stdout=words, stderr=words, env=environment))
        codes = [rank.wait(timeout=280) for rank in ranks]
        assert codes == [0] * world, "\n".join((folder / f"words{r}").read_text()[-3000:] for r in range(world))
        return folder

    return started


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
    exact = case.dtype == "float32"
    assert one.margin[0] > 1e-4 or not exact
    close = 1e-6 if exact else 1e-3
    # Products of a part of the width are rounded to bf16 before they are added up, gradients a micro-batch at a time.
    norm_close = 1e-6 if exact else 3e-3
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
    limits = {"gradient": close if exact else 2e-2, "model": 1e-4 if exact else 1e-2, "optimizer": None}
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


@pytest.mark.parametrize("case", [case for case in ALL if not case.values[0].outside])
def test_bytes_are_those_of_the_formulas(case, ranks):
    for answer, _ in ranks(case):
        for name, formula in answer["footprint"].items():
            assert answer["held_bytes"][name] == pytest.approx(formula, rel=0.02), name
        assert answer["sent"] == answer["traffic"]


def test_stage_3_is_refused_in_one_line():
    pytest.importorskip("deepspeed")
    from sigmoe.parallel.zero import ZeroEngine

    with pytest.raises(ValueError, match=r"\Aparallel.zero_stage=3 is refused: [^\n]+valid would be 1 or 2\Z"):
        ZeroEngine(None, None, None, ParallelConfig(zero_stage=3), None)


def error(ours, theirs):
    """Norm-relative distance; where the truth is zero, the distance itself."""
    scale = float(theirs.double().norm())
    return float((ours.double() - theirs.double()).norm()) / (scale if scale > 0 else 1.0)
