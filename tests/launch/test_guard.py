"""The step guard: what is a spike, what lasts, what ends a run; and nothing depends on where it was resumed."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from sigmoe.launch.guard import GuardConfig, StepGuard
from sigmoe.launch.trainer import Trainer


def guard(**changes):
    return StepGuard(GuardConfig(**({"window": 16, "patience": 3} | changes)))


def calm(watch, steps, level=2.0, phase=0):
    """Let so many steps pass whose losses differ by a tenth; returns their verdicts."""
    return [watch.observe(level + 0.05 * (-1) ** step, skipped=False, phase=phase) for step in range(steps)]


def test_deviations_are_those_of_the_losses_before():
    watch = guard(spike=6.0)
    calm(watch, 16)
    deviation = math.sqrt(16 * 0.05**2 / 15)
    assert watch.observe(2 + 5.9 * deviation, skipped=False, phase=0).deviations is None
    watch = guard(spike=6.0)
    calm(watch, 16)
    assert watch.observe(2 + 6.5 * deviation, skipped=False, phase=0).deviations == pytest.approx(6.5)
    assert watch.losses == [2.05, 1.95] * 8  # it is not let in


def test_a_low_loss_and_too_few_losses_are_no_spike():
    watch = guard()
    assert all(verdict.deviations is None for verdict in calm(watch, 7))
    assert watch.observe(100.0, skipped=False, phase=0).deviations is None
    watch = guard()
    calm(watch, 8)
    assert watch.observe(0.0, skipped=False, phase=0).deviations is None
    assert watch.observe(100.0, skipped=False, phase=0).deviations is not None


def test_it_can_be_switched_off():
    watch = guard(spike=0.0)
    calm(watch, 16)
    assert watch.observe(1e9, skipped=False, phase=0).deviations is None


def test_equal_losses_have_no_deviation_at_all():
    watch = guard()
    for _ in range(16):
        watch.observe(2.0, skipped=False, phase=0)
    assert watch.observe(2.0, skipped=False, phase=0).deviations is None
    assert watch.observe(2.1, skipped=False, phase=0).deviations == math.inf


def test_another_phase_has_another_level():
    watch = guard()
    calm(watch, 16)
    assert all(verdict.deviations is None for verdict in calm(watch, 16, level=9.0, phase=1))
    assert watch.observe(100.0, skipped=False, phase=1).deviations is not None


def test_what_lasts_is_settled_or_gone_behind_once():
    watch = guard(rollback=True)
    calm(watch, 16)
    assert [watch.observe(5.0, skipped=False, phase=0).lasts for _ in range(3)] == [False, False, True]
    assert (watch.bad, watch.may_go_back) == (3, True)
    watch.rolled_back = (4, 19)
    assert not watch.may_go_back
    assert not guard(rollback=False).may_go_back
    watch.settle()
    assert all(verdict.deviations is None for verdict in calm(watch, 16, level=5.0))


def test_skipped_steps_in_a_row_end_the_run():
    watch = guard(max_skipped=4)
    nan = math.nan
    ends = [watch.observe(nan, skipped=True, phase=0).end for _ in range(3)]
    ends += [watch.observe(2.0, skipped=False, phase=0).end]
    ends += [watch.observe(nan, skipped=True, phase=0).end for _ in range(4)]
    assert ends == [False] * 7 + [True]
    assert watch.losses == [2.0]
    assert not any(guard(max_skipped=0).observe(nan, skipped=True, phase=0).end for _ in range(100))


@pytest.mark.parametrize("at", [1, 9, 20, 33, 50])
def test_resumed_anywhere_it_says_the_same(at):
    chooser = random.Random(0)
    steps = [(chooser.gauss(2, 0.1) + 3 * (30 <= step < 36), chooser.random() < 0.1, step // 45) for step in range(60)]
    whole, first, second = guard(), guard(), guard()
    verdicts = [whole.observe(loss, skipped=skipped, phase=phase) for loss, skipped, phase in steps]
    assert sum(verdict.deviations is not None for verdict in verdicts) >= 4
    for loss, skipped, phase in steps[:at]:
        first.observe(loss, skipped=skipped, phase=phase)
    second.load_json(json.loads(json.dumps(first.to_json())))
    resumed = [second.observe(loss, skipped=skipped, phase=phase) for loss, skipped, phase in steps[at:]]
    assert resumed == verdicts[at:]
    assert second.to_json() == whole.to_json()


@pytest.mark.parametrize(
    "change", [{"max_skipped": -1}, {"window": 7}, {"spike": -0.1}, {"spike": math.nan}, {"patience": 0}]
)
def test_mistakes_name_the_field(change):
    (name,) = change
    with pytest.raises(ValueError, match=rf"guard\.{name} must be at least"):
        GuardConfig(**change)


SPIKE = ["steps=9", "guard.window=8", "guard.spike=0", "guard.max_skipped=0", "save.keep=null"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_that_cannot_go_back_goes_on_and_says_so_once(train, capfd, monkeypatch, whole):
    """All that it could go back to is damaged; or there is nothing yet."""
    step = Trainer.train_step

    def faulty(trainer):
        if trainer.step == 4:
            for path in () if whole else Path("run/checkpoints").glob("step-*/manifest.json"):
                path.unlink()
        done = step(trainer)
        return replace(done, skipped=True) if trainer.step >= 5 else done

    monkeypatch.setattr(Trainer, "train_step", faulty)
    every = "save.every=6" if whole else "save.every=2"
    settings = ["guard.rollback=true", "guard.patience=3", "save.background=false", every, "out=run"]
    assert train(*SPIKE, *settings) == 0
    told = capfd.readouterr().err
    expected = (
        "there is no checkpoint of mid-run up to step 4" if whole else "not gone back: no checkpoint up to step 4 is"
    )
    assert told.count(expected) == told.count("up to step") == 1


@pytest.mark.parametrize(
    ("save", "told"),
    [
        ({"every": 0}, "set save.every, now 0"),
        ({"every": 5, "keep": 2}, "set save.keep to at least 3 "),
        ({"every": 9, "keep": 1}, "set save.keep to at least 2 "),
    ],
)
def test_a_rollback_without_effect_is_refused(train, capfd, save, told):
    settings = [f"save.{name}={value}" for name, value in save.items()]
    assert train(*settings, "guard.rollback=true", "out=run") == 2
    assert told in " ".join(capfd.readouterr().err.split())
