"""`sigmoe train -m`: one run a point, in its own process and folder."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sigmoe.launch.compose import sweep_points


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_the_points_of_a_sweep():
    fixed, points = sweep_points("train", ["seed=1,2", "steps=3", "optim.lr=choice(1e-3,2e-3)", "threads=range(1,3)"])
    assert fixed == ["steps=3"]
    assert len(points) == 8
    assert points[0] == ["seed=1", "optim.lr=0.001", "threads=1"]
    assert points[1] == ["seed=1", "optim.lr=0.001", "threads=2"]
    assert points[-1] == ["seed=2", "optim.lr=0.002", "threads=2"]
    assert sweep_points("train", ["steps=3", "phases=[{until: null}]"]) == (["steps=3", "phases=[{until: null}]"], [])


def test_a_failing_point_does_not_stop_the_others(train, tmp_path, capfd):
    assert train("-m", "steps=2", "seed=7", "global_batch=4,3", "micro_batch=2", "out=sweep/x y") == 2
    told = capfd.readouterr()
    assert "global_batch 3 is not a multiple of micro_batch 2" in told.err
    rows = {line.split()[1]: line for line in told.out.splitlines() if "global_batch=" in line}
    assert "well" in rows["global_batch=4"] and "exit code 2" in rows["global_batch=3"]
    assert sorted(path.name for path in (tmp_path / "sweep/x y").iterdir()) == ["global_batch=4"]
    assert train("steps=2", "seed=7", "micro_batch=2", "out=alone") == 0
    assert losses(tmp_path / "sweep/x y/global_batch=4") == losses(tmp_path / "alone")


def test_ctrl_c_saves_the_run_that_goes_on_and_starts_no_other(tiny, tmp_path):
    words = [*tiny, "steps=5000", "evaluate.tokens=64", "threads=1", "seed=1,2", "out=sweep"]
    command = [sys.executable, "-m", "sigmoe.launch.main", "train", "-m", *words]
    with (tmp_path / "words").open("w+") as told:
        run = subprocess.Popen(command, cwd=tmp_path, stdout=told, stderr=told, env=os.environ | {"COLUMNS": "140"})
        while "step 3 " not in (tmp_path / "words").read_text():
            assert run.poll() is None
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=60) == 130
    assert "stopped at step " in (tmp_path / "words").read_text()
    assert "not started" in (tmp_path / "words").read_text()
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["seed=1"]
    assert list((tmp_path / "sweep/seed=1/checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seed=1"], "-m needs a key with several values"),
        (["seed=1,1"], "two runs would have the same folder"),
        (["seed=1,2", "sed=3"], "unknown key sed; did you mean seed"),
        (["optim.lr=interval(0,1)"], "has no end of values"),
        (["out=a,b"], "-m: give out= one value"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_started(train, tmp_path, capfd, words, told):
    assert train("-m", *words, *([] if words[0].startswith("out=") else ["out=sweep"])) == 2
    error = capfd.readouterr().err
    assert told in error
    assert error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_a_launcher_starts_no_sweep(train, tmp_path, capfd, monkeypatch):
    with_two = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for key, value in (with_two | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(key, value)
    assert train("-m", "seed=1,2", "out=sweep") == 2
    assert capfd.readouterr().err == "sigmoe train: -m starts one job after the other: start it without torchrun\n"
    assert not list(tmp_path.iterdir())
