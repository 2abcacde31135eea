"""Kills `sigmoe extract` at its disk operations, and runs it again. Prints one JSON object.

    python kill_extract.py FOLDER OVERRIDE...

`one` domain becomes a directory of transformers' (every operation is tried), `both` one of sigmoe's own format.
"""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from kill_at import fork, install
from whole import look

from sigmoe.launch.main import main

SCENARIOS = {"one": ("domain=ships", 1), "both": ("domain=[recipes,ships]", 3)}  # and every how manieth operation
OUT = "models/cut"


def quiet(folder):
    """Work in `folder` from now on, what is printed into a file there."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    words = os.open("words", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)


def train(folder, overrides):
    quiet(folder)
    code = main(["train", *overrides, "steps=1", "out=run"])
    if code:
        sys.exit(code)


def extract(folder, domain, nth):
    """Run the command, die at the nth disk operation (0: never); returns those that were done."""
    quiet(folder)
    done = install(nth)
    code = main(["extract", f"checkpoint={folder.parent / 'parent/run'}", domain, f"out={OUT}", "verify=64"])
    if code:
        sys.exit(code)
    return done


def resume(folder, domain):
    """A later process: what it finds, and what running the command again leaves."""
    before = look(folder / OUT)
    extract(folder, domain, 0)
    names = sorted(path.name for path in (folder / "models").iterdir())
    return {"before": before, "after": look(folder / OUT), "names": names}


def try_point(folder, domain, nth, expected):
    """Why this point was not survived; empty where it was."""
    killed, _ = fork(lambda: extract(folder, domain, nth))
    status, found = fork(lambda: resume(folder, domain))
    if killed != -9 or status:
        return f"ended with {killed}, then with {status}: {(folder / 'words').read_text()[-2000:]}"
    if found["before"] not in (None, expected):
        return f"left {found['before']}"
    return "" if found == {"before": found["before"], "after": expected, "names": ["cut"]} else f"ended with {found}"


def run(folder, domain, every):
    """Try the points of a scenario."""
    undisturbed = folder.with_name(f"{folder.name}-undisturbed")
    status, operations = fork(lambda: extract(undisturbed, domain, 0))
    if status:
        sys.exit((undisturbed / "words").read_text())
    expected, problems = look(undisturbed / OUT), {}
    points = range(1, len(operations) + 1, every)
    for nth in points:
        wrong = try_point(folder, domain, nth, expected)
        if wrong:
            problems[f"{nth} ({operations[nth - 1]})"] = wrong
        shutil.rmtree(folder)
    return {"points": len(points), "operations": operations, "files": sorted(expected), "problems": problems}


if __name__ == "__main__":
    # Before any operation of torch, so that no thread is lost in a fork.
    torch.set_num_threads(1)
    for name in ("sigmoe.launch.extract", "sigmoe.launch.train", "sigmoe.launch.compose", "torch._dynamo"):
        importlib.import_module(name)  # once, instead of in every child
    place = Path(sys.argv[1])
    trained, _ = fork(lambda: train(place / "parent", sys.argv[2:]))
    if trained:
        sys.exit((place / "parent/words").read_text())
    print(json.dumps({name: run(place / name, *scenario) for name, scenario in SCENARIOS.items()}))
