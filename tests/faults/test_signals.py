"""Ctrl-C, SIGTERM and SIGUSR1 in `sigmoe train`: it saves, and what goes on ends with the same bits."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time

import pytest

from sigmoe.launch.session import Session
from sigmoe.launch.stop import StopRequest
from sigmoe.launch.trainer import Trainer

ALL = 200


def manifest(run, step):
    return json.loads((run / f"checkpoints/step-{step:08}/manifest.json").read_text())


def steps(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


@pytest.fixture
def send_at(monkeypatch):
    """Let the trainer send its own process a signal at the end of a step, the first time it is reached."""

    def send(*numbers, step):
        train_step, pending = Trainer.train_step, list(numbers)

        def sending(trainer):
            metrics = train_step(trainer)
            while pending and metrics.step == step:
                signal.raise_signal(pending.pop(0))
            return metrics

        monkeypatch.setattr(Trainer, "train_step", sending)

    return send


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_stopped_run_ends_as_the_undisturbed_one(train, tmp_path, capfd, send_at, number):
    assert train("out=whole") == 0
    send_at(number, step=3)
    assert train("out=stopped") == 0
    assert "stopped at step 3, saved; to resume, run again: " in capfd.readouterr().err
    assert steps(tmp_path / "stopped") == [3]
    assert train("out=stopped") == 0
    assert manifest(tmp_path / "stopped", 10) == manifest(tmp_path / "whole", 10)


def test_the_second_ctrl_c_stops_at_once_and_leaves_what_was_saved(train, tmp_path, send_at):
    send_at(signal.SIGINT, signal.SIGINT, step=3)
    assert train("out=run", "save.every=2") == 130
    assert steps(tmp_path / "run") == [2]
    assert train("out=run", "save.every=2") == 0
    assert steps(tmp_path / "run") == [6, 8, 10]


@pytest.mark.parametrize("stage", ["resume", "run"])
def test_a_signal_before_the_first_step_leaves_nothing_to_save(train, tmp_path, capfd, monkeypatch, stage):
    before = getattr(Session, stage)

    def sending(session):
        signal.raise_signal(signal.SIGTERM)
        return before(session)

    with monkeypatch.context() as patch:
        patch.setattr(Session, stage, sending)
        assert train("out=run") == 0
    assert "stopped at step 0, before there was anything to save; to resume, run again: " in capfd.readouterr().err
    assert steps(tmp_path / "run") == []
    assert train("out=run") == 0
    assert steps(tmp_path / "run") == [10]


def test_a_signal_in_the_last_evaluation_costs_no_step(train, tmp_path, monkeypatch):
    evaluate = Session._evaluate

    def sending(session, metrics):
        if session.trainer.step == 10:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(session, metrics)

    assert train("out=whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_evaluate", sending)
        assert train("out=run") == 0
    assert manifest(tmp_path / "run", 10) != manifest(tmp_path / "whole", 10)  # it lacks the evaluation
    assert train("out=run") == 0
    assert manifest(tmp_path / "run", 10) == manifest(tmp_path / "whole", 10)


def test_with_several_ranks_a_launchers_echo_is_no_second_ctrl_c(monkeypatch):
    """torchrun passes Ctrl-C on to ranks whom the terminal has told already."""
    asked, now, before = StopRequest(several=True), [100.0], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        with asked.listening(), asked.interruptible():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            now[0] += 6
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert asked.asked
        assert signal.getsignal(signal.SIGTERM) == asked._ask  # still: ranks do not leave at the same moment
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert signal.getsignal(signal.SIGINT) is before


def read_until(lines, start):
    told = []
    for line in lines:
        told.append(line)
        if line.startswith(start):
            return told
    raise AssertionError(f"the run ended early: {told}")


def wait_until_full(pipe):
    """Return when the writer has filled the pipe and stands still in the middle of its next line."""
    before, now = -1, 0
    while now != before or now < 3500:
        time.sleep(0.3)
        before, now = now, int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_ctrl_c_in_the_middle_of_writing_to_the_terminal(train, tiny, tmp_path):
    """A handler that wrote through the interrupted stream would be refused as reentrant, and the run lost."""
    settings = [*tiny, f"steps={ALL}", "evaluate.tokens=64", "threads=1"]
    command = [sys.executable, "-m", "sigmoe.launch.main", "train", *settings, "out=stopped"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    files = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **files) as run:
        # The lines of all steps are longer than twice so small a pipe: the run waits for us before its last one.
        fcntl.fcntl(run.stderr, fcntl.F_SETPIPE_SZ, 4096)
        told = read_until(run.stderr, "step 3 ")
        wait_until_full(run.stderr)
        run.send_signal(signal.SIGINT)
        told += run.stderr.readlines()
        assert run.wait() == 0, told
    assert "stopping after this step; press Ctrl-C again to stop without saving\n" in told
    (step,) = steps(tmp_path / "stopped")
    assert 3 <= step < ALL
    assert told[-1].startswith(f"stopped at step {step}, saved; to resume, run again: sigmoe train dataset=")
    assert told[-1].endswith("out=stopped\n")
    assert train(*settings, "out=stopped") == 0
    assert train(*settings, "out=whole") == 0
    assert manifest(tmp_path / "stopped", ALL) == manifest(tmp_path / "whole", ALL)
