"""Kills a save at every one of its disk operations, and looks at what a later process finds. Prints one JSON object.

    python kill_save.py FOLDER

`prune`: steps 2 and 4 stand, 6 is saved and 2 deleted. `replace`: a whole step 6 stands too and is replaced.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from kill_at import fork, install

from sigmoe.moe.storage.checkpoint import CheckpointContent, open_checkpoint
from sigmoe.moe.storage.tensors import named_tensors
from sigmoe.parallel.checkpointer import Checkpointer

KEEP = 2
EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w{}.weight"


def content(value):
    tensors = {EXPERT.format(e, w): torch.full((3, 2), value + e + w / 10) for e in range(2) for w in (1, 2, 3)}
    model = named_tensors(tensors)
    return CheckpointContent(
        model=model,
        optimizer={f"{name}.exp_avg": tensor for name, tensor in model.items()},
        state={"value": value},
        config={"dim": 2},
        registry={"domains": []},
        tokenizer=b"{}",
        hf_config=None,
    )


def prepare(folder, scenario):
    checkpointer = Checkpointer(folder, keep=None)
    for step in (2, 4):
        checkpointer.save(step, content(step))
    if scenario == "replace":
        checkpointer.save(6, content(66))


def save(folder, nth):
    done = install(nth)
    Checkpointer(folder, keep=KEEP).save(6, content(6))
    return done


def look(folder):
    """What stands there: each step's manifest (every file verified), `latest`, and every other name."""
    steps = {}
    for path in folder.glob("step-*"):
        checkpoint = open_checkpoint(path)
        checkpoint.verify()
        steps[path.name] = checkpoint.manifest
    latest = (folder / "latest").read_text()
    return {"steps": steps, "latest": latest, "names": sorted(path.name for path in folder.iterdir())}


def resume(folder):
    """A later process: which step it picks, what it hears, and what a second save leaves."""
    before = look(folder)
    told = []
    checkpoint = Checkpointer(folder, keep=KEEP).load_latest(told.append)
    cleaned = sorted(path.name for path in folder.iterdir())
    Checkpointer(folder, keep=KEEP).save(6, content(6))
    picked = [checkpoint.path.name, checkpoint.state["value"]]
    return {"before": before, "told": told, "picked": picked, "cleaned": cleaned, "after": look(folder)}


def check(found, expected, scenario):
    """Why this point was not survived; empty where it was."""
    new = "step-00000006" in found["before"]["steps"]
    old = ["step-00000006", 66] if scenario == "replace" else ["step-00000004", 4]
    problems = []
    if found["picked"] not in ([["step-00000006", 6], old] if new else [old]):
        problems.append(f"picked {found['picked']}")
    if found["told"]:
        problems.append(f"fell back: {found['told']}")
    if [name for name in found["cleaned"] if name.startswith(".")]:
        problems.append(f"left {found['cleaned']}")
    if found["after"] != expected:
        problems.append(f"saved again, {found['after']} stands there")
    return problems


def run(folder, scenario):
    """Try every point of a scenario."""
    base, reference, copy = folder / "base", folder / "reference", folder / "copy"
    prepare(base, scenario)
    shutil.copytree(base, reference)
    _, operations = fork(lambda: save(reference, 0))
    expected, problems = look(reference), {}
    for nth in range(1, len(operations) + 1):
        shutil.copytree(base, copy)
        killed, _ = fork(lambda nth=nth: save(copy, nth))
        status, found = fork(lambda: resume(copy))
        wrong = [f"the killed one ended with {killed}"] if killed != -9 else []
        wrong += check(found, expected, scenario) if status == 0 else [f"the later one ended with {status}"]
        if wrong:
            problems[f"{nth} ({operations[nth - 1]})"] = wrong
        shutil.rmtree(copy)
    return {"operations": operations, "problems": problems}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({scenario: run(Path(sys.argv[1]) / scenario, scenario) for scenario in ("prune", "replace")}))
