"""Kills ranks of a run of two that saves beside training, and lets it go on to the end. Prints one JSON object.

    python kill_background.py FOLDER POINTS OVERRIDE...

Half of the points lie at a random moment after a random step, and take one rank or both; the others at a random disk
operation of a rank, torn or done: nearly all of these are the saving thread's.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

import two_ranks
from kill_at import install
from two_ranks import RANKS, end, start, words

from sigmoe.launch.trainer import Trainer
from sigmoe.moe.storage.checkpoint import open_checkpoint

STEPS = 8
SETTINGS = [f"steps={STEPS}", "save.every=2", "save.keep=2", "evaluate.tokens=64", "parallel.ep=2"]


def tell_at(step, pipe):
    """Write a byte when that step is done."""
    train_step = Trainer.train_step

    def telling(trainer):
        metrics = train_step(trainer)
        if metrics.step == step:
            os.write(pipe, b".")
        return metrics

    Trainer.train_step = telling


def kill_after(folder, overrides, step, seconds, victims):
    """Kill so long after rank 0 has done that step."""
    reader, writer = os.pipe()
    pids = start(folder, overrides, lambda rank: tell_at(step, writer) if rank == 0 else None)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    time.sleep(seconds)
    for rank in victims:
        os.kill(pids[rank], 9)
    return end(pids)


def kill_in(folder, overrides, nth, victim):
    """Let a rank die at its nth disk operation."""
    return end(start(folder, overrides, lambda rank: install(nth) if rank == victim else None))


def undisturbed(folder, overrides):
    """Run; return what must stand at the end, each rank's disk operations, and the seconds of a step."""

    def count(rank):
        done, leave = install(0), os._exit

        def noting(code):
            (folder / f"operations-{rank}").write_text(str(len(done)))
            leave(code)

        os._exit = noting

    begin = time.monotonic()
    status = end(start(folder, overrides, count))
    if status != [0] * RANKS:
        sys.exit(words(folder))
    seconds = (time.monotonic() - begin) / STEPS  # starting included: an upper bound
    return result(folder), [int((folder / f"operations-{rank}").read_text()) for rank in range(RANKS)], seconds


def result(folder):
    """What must not depend on where the run was killed."""
    checkpoints = folder / "run/checkpoints"
    return {
        "manifest": json.loads((checkpoints / f"step-{STEPS:08}/manifest.json").read_text()),
        "latest": (checkpoints / "latest").read_text(),
        "hidden": [path.name for path in checkpoints.iterdir() if path.name.startswith(".")],
    }


def look(folder):
    """Check what a kill has left: whatever has a name is whole. Returns (problems, half a checkpoint was there)."""
    checkpoints, problems = folder / "run/checkpoints", []
    if not checkpoints.exists():
        return [], False
    steps = sorted(path.name for path in checkpoints.glob("step-*"))
    for name in steps:
        try:
            open_checkpoint(checkpoints / name).verify()
        except ValueError as error:
            problems.append(str(error))
    latest = checkpoints / "latest"
    if latest.exists() and latest.read_text().strip() not in steps:
        problems.append(f"latest names {latest.read_text()!r} of {steps}")
    return problems, any(path.name.startswith(".sigmoe-") for path in checkpoints.iterdir())


def points(number, operations, seconds):
    """Name and killing function of each."""
    chooser = random.Random(6)
    for place in range(number):
        victim = chooser.randrange(RANKS)
        if place % 2:
            nth = chooser.randint(1, operations[victim])
            yield (
                f"{place}-rank-{victim}-operation-{nth}",
                lambda *run, nth=nth, victim=victim: kill_in(*run, nth, victim),
            )
        else:
            step, moment = chooser.randint(1, STEPS - 1), chooser.uniform(0, 0.5 * seconds)
            victims = chooser.choice(([victim], range(RANKS)))
            yield (
                f"{place}-ranks-{'-'.join(map(str, victims))}-step-{step}",
                lambda *run, at=(step, moment, victims): kill_after(*run, *at),
            )


def main(folder, number, overrides):
    two_ranks.load()
    overrides = [*overrides, *SETTINGS]
    expected, operations, seconds = undisturbed(folder / "undisturbed", overrides)
    problems, halves, tried = {}, 0, 0
    for name, killed_run in points(number, operations, seconds):
        copy = folder / name
        killed = killed_run(copy, overrides)
        found, half = look(copy)
        resumed = end(start(copy, overrides))
        tried, halves = tried + 1, halves + half
        if -9 not in killed:
            found.append(f"ended with {killed}")
        if resumed != [0] * RANKS:
            found.append(f"the later run ended with {resumed}: {words(copy)}")
        elif result(copy) != expected:
            found.append("the later run ended with other bytes")
        if found:
            problems[name] = found
    return {"tried": tried, "in_a_save": halves, "operations": operations, "problems": problems}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
