"""Kills a calibration at its disk operations and at random moments, and runs it again. Prints one JSON object.

    python kill_calibration.py FOLDER EVERY MOMENTS

EVERY how manieth operation is tried, and MOMENTS kills fall at moments that the clock decides.
"""

import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from kill_at import fork, install

from sigmoe.moe.canonical import canonical_tensors
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.data.tokenizer import train_tokenizer
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.moe.parsing import to_mapping
from sigmoe.moe.prune.calibrate import calibrate
from sigmoe.moe.prune.sums import load_sums, save_sums
from sigmoe.moe.prune.text import jsonl_text
from sigmoe.moe.storage.checkpoint import CheckpointContent, write_checkpoint
from sigmoe.moe.storage.durable import remove_directory
from sigmoe.moe.storage.tensors import named_tensors
from sigmoe.moe.stored import open_model

SHAPE = {"dim": 24, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "expert_dim": 16, "ffn_dim": 16}
TEXTS = [f"{number} red apples and {number * number} green ones lie in the sun" for number in range(40)]


def make(folder, **changes):
    """Write a model with a dense layer, and text; `changes` to its shape."""
    tokenizer = train_tokenizer(TEXTS, 300)
    router = RouterConfig(name="top_k", num_experts=4)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(), sparse_layers="upper:2", init_std=0.3, router=router, **(SHAPE | changes)
    )
    model = Transformer(config, config.build_registry(("any",)))
    initialize(model, 0)
    content = CheckpointContent(
        model=named_tensors(canonical_tensors(model)),
        optimizer={},
        state={"step": 1},
        config={"model": to_mapping(config), "sequence_length": 32},
        registry=model.registry.to_json(),
        tokenizer=tokenizer.to_str().encode(),
        hf_config=None,
    )
    write_checkpoint(folder / "model", content)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))


def run(place, folder, nth=0):
    """Calibrate, die at the nth disk operation (0: never); returns those that were done, and batches passed."""
    folder.mkdir(exist_ok=True)
    done, passed = install(nth), []
    model = open_model(place / "model")
    text = jsonl_text(model, place / "rows.jsonl", tokens=250, batch_size=2)
    if not (folder / "sums").exists():
        work = folder / ".sigmoe-part-sums"
        sums = calibrate(model, text, work, subsets=True, progress=lambda *counts: passed.append(counts))
        save_sums(folder / "sums", sums)
        remove_directory(work)
    return done, len(passed)


def look(folder):
    """The hash of every file of sums that load; None where there are none."""
    if not (folder / "sums").exists():
        return None
    load_sums(folder / "sums")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (folder / "sums").iterdir()}


def resume(place, folder):
    """A later process: what it finds, what running again leaves, and how many batches that took."""
    before = look(folder)
    _, passed = run(place, folder)
    return {"before": before, "after": look(folder), "passed": passed}


def after_kill(place, folder, expected):
    """Why a killed calibration was not survived (empty where it was), and how many batches were run again."""
    status, found = fork(lambda: resume(place, folder))
    shutil.rmtree(folder)
    if status:
        return f"ended with {status}", 0
    if found["before"] not in (None, expected) or found["after"] != expected:
        return f"found {found['before']}, left {found['after']}", 0
    return "", found["passed"]


def kill_in_time(place, folder, seconds):
    """Start a calibration and kill it from outside so much later; returns whether it was still running."""
    pid = os.fork()
    if pid == 0:
        try:
            run(place, folder)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def try_all(place, every, moments):
    """Try the points; see the top of the file."""
    begin = time.monotonic()
    status, (operations, whole) = fork(lambda: run(place, place / "undisturbed"))
    duration = time.monotonic() - begin
    assert status == 0
    expected, problems, passed, hits = look(place / "undisturbed"), {}, [], 0
    points = list(range(1, len(operations) + 1, every))
    for nth in points:
        killed, _ = fork(lambda nth=nth: run(place, place / "killed", nth))
        assert killed == -9, nth
        wrong, again = after_kill(place, place / "killed", expected)
        passed.append(again)
        if wrong:
            problems[f"{nth} ({operations[nth - 1]})"] = wrong
    chance = random.Random(0)
    while hits < moments:
        hits += (killed := kill_in_time(place, place / "killed", seconds := chance.uniform(0, duration)))
        if (place / "killed").exists():
            wrong, again = after_kill(place, place / "killed", expected)
            if wrong:
                problems[f"{seconds} s"] = wrong
        duration *= 1 if killed else 0.9
    return {
        "points": len(points) + hits,
        "operations": sorted(set(operations)),
        "files": sorted(expected),
        "problems": problems,
        "whole": whole,
        "passed": passed,
    }


if __name__ == "__main__":
    # Before any operation of torch, so that no thread is lost in a fork.
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # once, instead of in every child
    place = Path(sys.argv[1])
    place.mkdir()
    status, _ = fork(lambda: make(place))
    assert status == 0
    print(json.dumps(try_all(place, int(sys.argv[2]), int(sys.argv[3]))))
