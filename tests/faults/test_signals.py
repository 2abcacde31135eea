"""Ctrl-C and SIGTERM in `sigmoe train`: it saves, says how to go on, and what goes on ends with the same bits."""

import fcntl
import json
import signal
import subprocess
import sys

import pytest

STEPS = 200


def read_until(lines, start):
    told = []
    for line in lines:
        told.append(line)
        if line.startswith(start):
            return told
    raise AssertionError(f"the run ended early: {told}")


def manifest(run, step):
    return json.loads((run / f"checkpoints/step-{step:08}/manifest.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stopped_run_saves_and_goes_on(train, tiny, tmp_path, number):
    settings = [*tiny, f"steps={STEPS}", "evaluate.tokens=64", "threads=1"]
    command = [sys.executable, "-m", "sigmoe.launch.main", "train", *settings, "out=stopped"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        # A step's line is longer than 20 characters: with so small a pipe the run waits for us before its last step.
        fcntl.fcntl(run.stderr, fcntl.F_SETPIPE_SZ, 4096)
        told = read_until(run.stderr, "step 3 ")
        run.send_signal(number)
        told += run.stderr.readlines()
        assert run.wait() == 0, told
    assert any("stopping after this step" in line for line in told)
    step = max(int(path.name[5:]) for path in (tmp_path / "stopped/checkpoints").glob("step-*"))
    assert 3 <= step < STEPS
    assert told[-1].startswith(f"stopped at step {step}, saved; to resume, run again: sigmoe train dataset=")
    assert told[-1].rstrip().endswith("out=stopped")
    assert train(*settings, "out=stopped") == 0
    assert train(*settings, "out=whole") == 0
    assert manifest(tmp_path / "stopped", STEPS) == manifest(tmp_path / "whole", STEPS)
