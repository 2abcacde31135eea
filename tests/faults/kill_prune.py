"""Kills `sigmoe prune` at its disk operations, and runs it again. Prints one JSON object.

    python kill_prune.py FOLDER KILLS

As many KILLS fall at moments drawn among all operations, one of them at the last.
"""

import importlib
import json
import os
import random
import shutil
import sys
from pathlib import Path

import torch
from kill_at import fork, install
from kill_calibration import make
from whole import look

from sigmoe.launch.main import main

OUT = "models/pruned"
SHAPE = {"dim": 64, "expert_dim": 512}  # several weight files of the least size
KEYS = ["keep=0.75", "merge=true", "file_bytes=1MiB", "threads=1", f"out={OUT}"]


def prune(place, folder, nth, *keys):
    """Run the command in `folder`, die at the nth disk operation (0: never); returns those that were done."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    words = os.open("words", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)
    done = install(nth)
    code = main(["prune", f"model={place}/model", f"stats={place}/sums", *KEYS, *keys])
    if code:
        sys.exit(code)
    return done


def nodes(folder):
    """The weight files that lie there under whatever name, by their inodes."""
    return {file.stat().st_ino for file in folder.rglob("model-*.safetensors")}


def resume(place, folder):
    """A later process: what it finds, what running the command again leaves, and how many files it took over."""
    before, there = look(folder / OUT), nodes(folder)
    prune(place, folder, 0)
    names = sorted(path.name for path in (folder / "models").iterdir())
    return {"before": before, "after": look(folder / OUT), "names": names, "kept": len(there & nodes(folder))}


def try_point(place, folder, nth, expected):
    """Why this point was not survived (empty where it was), and how many files were taken over."""
    killed, _ = fork(lambda: prune(place, folder, nth))
    status, found = fork(lambda: resume(place, folder))
    words = (folder / "words").read_text()
    shutil.rmtree(folder)
    if killed != -9 or status:
        return f"ended with {killed}, then with {status}: {words[-2000:]}", 0
    if found["before"] not in (None, expected):
        return f"left {found['before']}", 0
    wanted = {"after": expected, "names": ["pruned"]}
    return "" if wanted.items() <= found.items() else f"ended with {found}", found["kept"]


def run(place, kills):
    """Try the points."""
    undisturbed = place / "undisturbed"
    status, operations = fork(lambda: prune(place, undisturbed, 0))
    if status:
        sys.exit((undisturbed / "words").read_text())
    expected, problems, kept = look(undisturbed / OUT), {}, []
    points = sorted([*random.Random(0).sample(range(1, len(operations)), kills - 1), len(operations)])
    for nth in points:
        wrong, files = try_point(place, place / "killed", nth, expected)
        kept.append(files)
        if wrong:
            problems[f"{nth} ({operations[nth - 1]})"] = wrong
    return {
        "points": points,
        "operations": operations,
        "files": sorted(expected),
        "problems": problems,
        "kept": kept,
    }


if __name__ == "__main__":
    # Before any operation of torch, so that no thread is lost in a fork.
    torch.set_num_threads(1)
    for name in ("sigmoe.launch.prune", "sigmoe.launch.compose", "torch._dynamo"):
        importlib.import_module(name)  # once, instead of in every child
    top = Path(sys.argv[1])
    top.mkdir()
    make(top, **SHAPE)
    made, _ = fork(lambda: prune(top, top / "first", 0, f"data={top}/rows.jsonl", "tokens=250"))
    if made:
        sys.exit((top / "first/words").read_text())
    print(json.dumps(run(top, int(sys.argv[2]))))
