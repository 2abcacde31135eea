"""A disk that is full while `sigmoe train` saves: training goes on, the old checkpoint stands, nothing half is left."""

import json
from importlib.util import find_spec

import pytest

from sigmoe.launch.saves import Saves

# Between the size of model/ and that of optimizer/, so that a save fails when it is well under way.
LIMIT = 100_000


def manifest(run, step):
    return json.loads((run / f"checkpoints/step-{step:08}/manifest.json").read_text())


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def full_between(limit_files, monkeypatch):
    """Let the disk be full from the save of one step on, up to that of another (None: for good)."""
    bounds, begin = [None, None], Saves.begin

    def limited(saves, step, content):
        if step in bounds:
            saves.wait()
            limit_files(LIMIT if step == bounds[0] else None)
        begin(saves, step, content)

    def arrange(first, last):
        limit_files(None)
        bounds[:] = first, last

    monkeypatch.setattr(Saves, "begin", limited)
    return arrange


@pytest.mark.parametrize("background", ["true", "false"])
def test_training_goes_on_without_the_save(train, tmp_path, capfd, full_between, survived, background):
    settings = ["save.every=2", "save.keep=null", f"save.background={background}"]
    assert train("out=whole", *settings) == 0
    full_between(4, 8)
    capfd.readouterr()
    assert train("out=run", *settings) == 0
    told = capfd.readouterr().err
    lines = [line for line in told.splitlines() if "is not saved" in line]
    refused = [
        line.startswith(f"step {step} is not saved, training goes on: ") and line.endswith("File too large")
        for step, line in zip((4, 6), lines)
    ]
    left = names(tmp_path / "run") == ["latest", "step-00000002", "step-00000008", "step-00000010"]
    whole = left and manifest(tmp_path / "run", 10) == manifest(tmp_path / "whole", 10)
    survived("disk full in a save of one process", 2, sum(refused) if whole else 0)
    assert refused == [True, True], told
    assert whole, names(tmp_path / "run")


def test_a_run_that_cannot_be_saved_at_its_end_says_so(train, tmp_path, capfd, full_between):
    full_between(4, None)
    assert train("out=run", "save.every=2") == 1
    told = capfd.readouterr().err.splitlines()
    assert told[-1].startswith("sigmoe train: ")
    assert "File too large" in told[-1]
    assert names(tmp_path / "run") == ["latest", "step-00000002"]
    full_between(None, None)
    assert train("out=run", "save.every=2") == 0
    assert names(tmp_path / "run")[-1] == "step-00000010"


@pytest.mark.skipif(
    find_spec("deepspeed") is None or find_spec("megatron") is None, reason="needs deepspeed and megatron-core"
)
def test_one_rank_whose_disk_is_full_beside_training(run_program, memory_folder, tiny, survived):
    """Each of two ranks in turn, for two saves: both ranks leave those out, and the next one succeeds."""
    found = run_program("full_background.py", memory_folder / "full", *tiny)
    survivors = 0
    for unlucky, ended in found["unlucky"].items():
        where = "" if unlucky == "0" else "rank 1: "
        lines = [line for line in ended["words"] if "is not saved" in line]
        told = [
            f"step {step} is not saved, training goes on: {where}" in line and line.endswith("File too large")
            for step, line in zip((4, 6), lines)
        ]
        left = ["latest", "step-00000002", "step-00000008", "step-00000010"]
        whole = (ended["status"], ended["names"], ended["manifest"]) == ([0, 0], left, found["whole"])
        survivors += 2 * (whole and told == [True, True])
    survived("disk full for one of two ranks that save beside training", 4, survivors)
    assert survivors == 4, found
