"""Kills one of two ranks at a disk operation of their save, and looks at what both of a later run find. Prints JSON.

    python kill_save_together.py FOLDER beside|waiting POINTS

POINTS of each rank's disk operations are tried, spread over all of them.
Step 4 stands, 6 is saved, beside other collectives or while all wait. Every rank is a fork of this process: nothing is
imported twice.
"""

import json
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from kill_at import install
from torch import distributed

from sigmoe.moe.storage.checkpoint import CheckpointContent, open_checkpoint
from sigmoe.parallel.checkpointer import Checkpointer
from sigmoe.parallel.gather import Gathered
from sigmoe.parallel.mesh import Axis, background_axis
from sigmoe.parallel.pieces import Piece

WAIT, LIMIT = 10, 25  # seconds that a rank waits for the other, and until it must have ended
TRAINED = 20  # collectives of the main thread while another saves
FAILED = 3
EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w{}.weight"


def content(value, world):
    """Every rank holds an expert, and half of what both share."""
    whole = torch.full((6,), float(value))
    pieces = [piece(EXPERT.format(world.rank, w), (3, 2), 0, 6, whole + world.rank + w / 10) for w in (1, 2, 3)]
    pieces.append(piece("model.norm.weight", (6,), 3 * world.rank, 3 * world.rank + 3, whole[:3].clone()))
    moments = [piece(f"{p.name}.exp_avg", p.shape, p.begin, p.end, p.tensor) for p in pieces]
    return CheckpointContent(
        model=Gathered(pieces, world),
        optimizer=Gathered(moments, world),
        state={"value": value},
        config={"dim": 2},
        registry={"domains": []},
        tokenizer=b"{}",
        hf_config=None,
    )


def piece(name, shape, begin, end, tensor):
    return Piece(name=name, shape=shape, dim=None, start=0, stop=0, begin=begin, end=end, tensor=tensor)


def join(rank, rendezvous):
    store = distributed.FileStore(str(rendezvous), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=WAIT))
    return Axis(group=distributed.group.WORLD, rank=rank, size=2)


def save(world, folder, step, nth, *, beside=False):
    """Save, dying at the nth operation (0: never); returns how many there were."""
    saved = content(step, world)
    background = background_axis(world, WAIT) if beside else None
    checkpointer = Checkpointer(folder, keep=2, world=world, background=background)
    done = install(nth)
    if beside:
        saving = checkpointer.begin_save(step, saved)
        for _ in range(TRAINED):
            distributed.all_reduce(torch.ones(100))
        saving.result()
    else:
        checkpointer.save(step, saved)
    return len(done)


def resume(world, folder):
    """A later run: which step it picks, what it hears; then it saves again."""
    told = []
    checkpoint = Checkpointer(folder, keep=2, world=world).load_latest(told.append)
    save(world, folder, 6, 0)
    return [checkpoint.path.name, checkpoint.state["value"], told]


def both(folder, work):
    """Fork two ranks that do `work(world)`; returns each one's exit status, its answer, and the seconds it took."""
    folder.mkdir()
    begin, pids = time.monotonic(), []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            run_rank(folder, rank, work)
        pids.append(pid)
    left, status, seconds = dict(enumerate(pids)), [None, None], [None, None]
    while left and time.monotonic() - begin < LIMIT:
        for rank, pid in list(left.items()):
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                status[rank], seconds[rank] = os.waitstatus_to_exitcode(code), time.monotonic() - begin
                del left[rank]
        time.sleep(0.01)
    for pid in left.values():
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    answers = [json.loads(path.read_text()) if (path := folder / f"{rank}").exists() else None for rank in range(2)]
    return status, answers, seconds


def run_rank(folder, rank, work):
    code = 1
    try:
        world = join(rank, folder / "rendezvous")
        (folder / f"{rank}").write_text(json.dumps(work(world)))
        distributed.destroy_process_group()
        code = 0
    except (RuntimeError, OSError) as error:  # what `lost_peer` of the train command knows, or a rank's WriteError
        (folder / f"{rank}").write_text(json.dumps(str(error)))
        code = FAILED
    finally:
        os._exit(code)


def look(folder):
    """Every step's manifest, all files verified; `latest`; all names."""
    steps = {}
    for path in folder.glob("step-*"):
        checkpoint = open_checkpoint(path)
        checkpoint.verify()
        steps[path.name] = checkpoint.manifest
    return steps, (folder / "latest").read_text(), sorted(path.name for path in folder.iterdir())


def problems_at(base, expected, work, victim, nth, beside):
    """Why this point was not survived; empty where it was."""
    folder = work / f"{victim}-{nth}"
    shutil.copytree(base, folder / "run")
    status, _, seconds = both(
        folder / "killed", lambda world: save(world, folder / "run", 6, nth * (world.rank == victim), beside=beside)
    )
    problems = []
    if status[victim] != -9:
        problems.append(f"the killed rank ended with {status[victim]}")
    if status[1 - victim] != FAILED:
        problems.append(f"the other ended with {status[1 - victim]} after {seconds[1 - victim]} s")
    steps, latest, _ = look(folder / "run")
    if latest.strip() not in steps:
        problems.append(f"latest names {latest}")
    newest = max(steps)
    status, answers, _ = both(folder / "later", lambda world: resume(world, folder / "run"))
    if status != [0, 0] or answers != [[newest, int(newest[5:]), []]] * 2:
        problems.append(f"the later ranks ended with {status}: {answers}")
    elif look(folder / "run") != expected:
        problems.append("saved again, other things stand there")
    shutil.rmtree(folder)
    return problems


def main(folder, beside, points):
    base, reference = folder / "base", folder / "reference"
    base.mkdir(parents=True)
    assert both(folder / "first", lambda world: save(world, base, 4, 0))[0] == [0, 0]
    shutil.copytree(base, reference)
    status, operations, _ = both(folder / "second", lambda world: save(world, reference, 6, 0, beside=beside))
    assert status == [0, 0], operations
    expected, problems, tried = look(reference), {}, 0
    for victim in range(2):
        last = operations[victim]
        for nth in sorted({1 + (last - 1) * place // (points - 1) for place in range(points)}):
            tried += 1
            found = problems_at(base, expected, folder, victim, nth, beside)
            if found:
                problems[f"rank {victim}, operation {nth}"] = found
    return {"operations": operations, "tried": tried, "problems": problems}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2] == "beside", int(sys.argv[3]))))
