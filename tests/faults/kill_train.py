"""Kills `sigmoe train` at points spread over a run, and lets it go on to the end. Prints one JSON object.

    python kill_train.py FOLDER OVERRIDE...

A point is an optimizer step that was done, or the nth disk operation of the run (saves, and the run's own files).
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from kill_at import die, fork, install

from sigmoe.launch import session
from sigmoe.launch.main import main
from sigmoe.launch.trainer import Trainer
from sigmoe.parallel.checkpointer import Checkpointer

STEPS = 6
DISK_POINTS = 16
TIMED = ("tokens_per_second", "flops_share")


def train(folder, overrides):
    """Run the command in this process, its words into a file beside the run. Returns nothing, exits where it fails."""
    session.matmul_rate = lambda device, dtype: 1.0  # a third of a second that only scales a reported share
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    words = os.open("words", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)
    settings = [f"steps={STEPS}", "save.every=2", "save.keep=1", "evaluate.every=4", "evaluate.tokens=64"]
    code = main(["train", *overrides, *settings, "out=run"])
    if code:
        sys.exit(code)


def train_until_step(folder, overrides, step):
    """Die when that step is done, before anything is logged or saved of it."""
    train_step = Trainer.train_step

    def deadly(trainer):
        metrics = train_step(trainer)
        if metrics.step == step:
            die()
        return metrics

    Trainer.train_step = deadly
    train(folder, overrides)


def train_until_operation(folder, overrides, nth):
    """Die at the nth disk operation (0: never); returns all that were done, and which of them belong to saves."""
    done, saves, write = [], [], Checkpointer._write

    def noted(*arguments):
        begin = len(done)
        write(*arguments)
        saves.append([begin + 1, len(done)])

    Checkpointer._write = noted
    done = install(nth)
    train(folder, overrides)
    return {"operations": done, "saves": saves}


def result(folder):
    """What must not depend on where the run was killed."""
    run = folder / "run"
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        # A kill after the last save, before the deletion of the one before it, leaves both: nothing is lost.
        "checkpoints": [name for name in kept if name != f"step-{STEPS - 2:08}"],
        "names": sorted(path.name for path in run.iterdir()),
        "manifest": json.loads((run / f"checkpoints/step-{STEPS:08}/manifest.json").read_text()),
        "metrics": [{key: value for key, value in row.items() if key not in TIMED} for row in rows],
    }


def spread(undisturbed):
    """Disk operations to die at: over the whole run, at the write of config.yaml, just before the first save."""
    operations, saves = undisturbed["operations"], undisturbed["saves"]
    even = [1 + (len(operations) - 1) * i // (DISK_POINTS - 1) for i in range(DISK_POINTS)]
    return sorted({*even, 1 + operations.index("write"), saves[0][0] - 1})


def try_points(folder, overrides):
    undisturbed = folder / "undisturbed"
    status, counted = fork(lambda: train_until_operation(undisturbed, overrides, 0))
    if status:
        sys.exit((undisturbed / "words").read_text())
    expected, problems = result(undisturbed), {}
    points = [("step", train_until_step, step) for step in range(1, STEPS + 1)]
    points += [("operation", train_until_operation, nth) for nth in spread(counted)]
    for kind, killed_train, number in points:
        copy = folder / f"{kind}-{number}"
        killed, _ = fork(lambda: killed_train(copy, overrides, number))  # noqa: B023 - called at once
        resumed, _ = fork(lambda: train(copy, overrides))  # noqa: B023
        if killed != -9 or resumed != 0:
            problems[copy.name] = f"ended with {killed}, then {resumed}: {(copy / 'words').read_text()[-2000:]}"
        elif (found := result(copy)) != expected:
            problems[copy.name] = [key for key in expected if found[key] != expected[key]]
    return {"points": len(points), "problems": problems, "rows": len(expected["metrics"]), **counted}


if __name__ == "__main__":
    # Before any operation of torch, so that no thread is lost in a fork.
    torch.set_num_threads(1)
    for name in ("sigmoe.launch.train", "sigmoe.launch.compose", "torch._dynamo"):
        importlib.import_module(name)  # once, instead of in every child
    print(json.dumps(try_points(Path(sys.argv[1]), sys.argv[2:])))
