"""Injects a fault into one of two ranks, a scenario at a time, and prints what became of the runs, as JSON.

python rank_faults.py FOLDER OVERRIDE...
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from inject import (
    another_config,
    another_machine,
    another_version,
    at_step,
    in_evaluation,
    junk_data,
    oversleep,
    record_samples,
    signalled,
    spoil_gradients,
    while_loading,
)
from kill_at import fork
from two_ranks import end, load, start

from sigmoe.launch.main import main

STEPS = 6
ALWAYS = ["logger.every=1", f"steps={STEPS}", "evaluate.tokens=64"]
EACH = ["save.every=1", "save.keep=null"]
SPIKE = ["steps=40", "optim.lr=2e-2", "guard.window=16", "guard.patience=3", "guard.rollback=true"]
SPIKE += ["save.every=4", "save.keep=null"]
STILL = ["parallel.watchdog=2"]
NO_TOKEN = ["parallel.ep=2", "router.sets=1", "router.top_k=1", "phases=[{until: null, weights: {ships: 1}}]"]

NOTHING, JUNK = (lambda: None), (lambda: junk_data(26, 32, 4))

# Name: the rank (None: both), what is arranged there, overrides.
SCENARIOS = {
    "oversleeps": (1, lambda: at_step(3, oversleep), STILL),
    "rank 1 is stopped": (1, lambda: at_step(3, signalled("SIGSTOP")), STILL),
    "rank 0 is stopped": (0, lambda: at_step(3, signalled("SIGSTOP")), STILL),
    "SIGTERM": (1, lambda: at_step(3, signalled("SIGTERM")), []),
    "SIGUSR1": (1, lambda: at_step(3, signalled("SIGUSR1")), []),
    "SIGINT": (None, lambda: at_step(3, signalled("SIGINT")), []),
    "SIGTERM while loading": (1, lambda: while_loading(signalled("SIGTERM")), []),
    "SIGTERM in the last evaluation": (1, lambda: in_evaluation(STEPS, signalled("SIGTERM")), []),
    "nan once": (1, lambda: spoil_gradients(3, 3, torch.nan), EACH),
    "inf for good": (1, lambda: spoil_gradients(3, STEPS, torch.inf), [*EACH, "guard.max_skipped=3"]),
    "spike": (None, JUNK, [*SPIKE, "parallel.ep=2"]),
    "no token": (None, NOTHING, NO_TOKEN),
    "another config": (1, another_config, []),
    "another version": (1, another_version, []),
    "another machine": (1, another_machine, []),
}


def inject(folder, name, overrides):
    """Run a scenario; return exit statuses and seconds."""
    where, arrange, settings = SCENARIOS[name]
    begin = time.monotonic()
    pids = start(folder, [*overrides, *ALWAYS, *settings], lambda rank: arrange() if where in (None, rank) else None)
    return end(pids), time.monotonic() - begin


def damaged(folder, run, overrides, damage):
    """Resume a run whose newest checkpoint is damaged."""
    shutil.copytree(run, folder / "run")
    begin = time.monotonic()
    damage(max((folder / "run/checkpoints").glob("step-*")))
    return end(start(folder, [*overrides, *ALWAYS, *EACH, "steps=8"])), time.monotonic() - begin


def cut(step):
    """Halve a shard."""
    shard = next((step / "optimizer").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def lose(step):
    """Remove a shard."""
    next((step / "model").glob("*.safetensors")).unlink()


def flip(step):
    """Flip a bit of a shard."""
    shard = next((step / "model").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)


def alone(folder, overrides, arrange=lambda: None):
    """Run in one process; return its exit status, in a list."""

    def run():
        os.chdir(folder)
        words = os.open("words", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(words, 1)
        os.dup2(words, 2)
        arrange()
        return main(["train", *overrides, "out=run"])

    folder.mkdir(exist_ok=True, parents=True)
    return [fork(run)[0]]


def found(folder, status, seconds=0.0):
    """What is left of a run."""
    run = folder / "run"
    steps = {int(path.name[5:]): path for path in (run / "checkpoints").glob("step-*")}
    metrics = run / "metrics.jsonl"
    manifests = {step: json.loads((path / "manifest.json").read_text())["files"] for step, path in steps.items()}
    model = {step: {name: at for name, at in files.items() if "model/" in name} for step, files in manifests.items()}
    return {
        "status": status,
        "seconds": seconds,
        "words": [path.read_text() for path in sorted(folder.glob("words-*"))],
        "stacks": sorted(path.name for path in run.glob("stacks-*")),
        "steps": sorted(steps),
        "begun": run.exists(),
        "model": {step: json.dumps(files, sort_keys=True) for step, files in model.items()},
        "all": {step: json.dumps(files, sort_keys=True) for step, files in manifests.items()},
        "guard": {step: json.loads((path / "state.json").read_text())["guard"] for step, path in steps.items()},
        "rows": [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else [],
        "samples": [[int(line) for line in path.read_text().split()] for path in sorted(folder.glob("samples-*"))],
    }


def change_ranks(folder, overrides):
    """Two ranks, one, two that share experts, each up to a later step."""
    for settings, ranks in ((["stop_at=2"], 2), (["stop_at=4"], 1), (["parallel.ep=2"], 2)):
        words = [*overrides, *ALWAYS, *settings]
        if ranks == 1:
            status = alone(folder, words, lambda: record_samples("samples-0"))
        else:
            status = end(start(folder, words, lambda rank: record_samples(f"samples-{rank}")))
        if any(status):
            break
    return found(folder, status)


def interrupt_a_spike(folder, overrides):
    """One process that stops in the midst of a spike, and goes on."""
    spiked = [*overrides, *ALWAYS, *SPIKE]
    alone(folder, [*spiked, "stop_at=25"], JUNK)
    return found(folder, alone(folder, spiked, JUNK))


def try_all(place, overrides):
    """Run every scenario, and what they are compared with."""
    told = {}
    for name in SCENARIOS:
        folder = place / name.replace(" ", "-")
        told[name] = found(folder, *inject(folder, name, overrides))
    always = [*overrides, *ALWAYS]
    for name, settings, arrange in (
        ("whole", [], NOTHING),
        ("whole spike", SPIKE, JUNK),
        ("whole token", NO_TOKEN, NOTHING),
    ):
        alike = [word for word in settings if not word.startswith("parallel")]
        told[name] = found(place / name, alone(place / name, [*always, *alike], arrange))
    told["interrupted spike"] = interrupt_a_spike(place / "interrupted", overrides)
    evaluation = place / "SIGTERM-in-the-last-evaluation"
    told["evaluated"] = found(evaluation, end(start(evaluation, always)))
    for damage, run in ((cut, "whole"), (lose, "whole"), (flip, "nan-once")):
        folder = place / damage.__name__
        told[damage.__name__] = found(folder, *damaged(folder, place / run / "run", overrides, damage))
    told["ranks"] = change_ranks(place / "ranks", overrides)
    return told


if __name__ == "__main__":
    load()
    place = Path(sys.argv[1])
    place.mkdir()
    print(json.dumps(try_all(place, sys.argv[2:])))
