"""A disk that is full while `sigmoe train` saves: training goes on, the old checkpoint stands, nothing half is left."""

import json

import pytest

from sigmoe.launch.trainer import Trainer

# Between the size of model/ and that of optimizer/, so that a save fails when it is well under way.
LIMIT = 100_000


def manifest(run, step):
    return json.loads((run / f"checkpoints/step-{step:08}/manifest.json").read_text())


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def full_between(limit_files, monkeypatch):
    """Let the disk be full from the end of one step on, to the end of another (None: for good)."""
    bounds, train_step = [None, None], Trainer.train_step

    def limited(trainer):
        metrics = train_step(trainer)
        if metrics.step in bounds:
            limit_files(LIMIT if metrics.step == bounds[0] else None)
        return metrics

    def arrange(first, last):
        limit_files(None)
        bounds[:] = first, last

    monkeypatch.setattr(Trainer, "train_step", limited)
    return arrange


def test_training_goes_on_without_the_save(train, tmp_path, capfd, full_between):
    assert train("out=whole", "save.every=2", "save.keep=null") == 0
    full_between(3, 7)
    capfd.readouterr()
    assert train("out=run", "save.every=2", "save.keep=null") == 0
    told = capfd.readouterr().err
    for step in (4, 6):
        assert f"step {step} is not saved, training goes on: " in told
    assert told.count("File too large") == 2
    assert names(tmp_path / "run") == ["latest", "step-00000002", "step-00000008", "step-00000010"]
    assert manifest(tmp_path / "run", 10) == manifest(tmp_path / "whole", 10)


def test_a_run_that_cannot_be_saved_at_its_end_says_so(train, tmp_path, capfd, full_between):
    full_between(3, None)
    assert train("out=run", "save.every=2") == 2
    told = capfd.readouterr().err.splitlines()
    assert told[-1].startswith("sigmoe train: ")
    assert "File too large" in told[-1]
    assert names(tmp_path / "run") == ["latest", "step-00000002"]
    full_between(None, None)
    assert train("out=run", "save.every=2") == 0
    assert names(tmp_path / "run")[-1] == "step-00000010"
