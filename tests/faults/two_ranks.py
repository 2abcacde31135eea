"""Two ranks of `sigmoe train` as forks of this process, which has imported everything once."""

import os
import socket
import sys
import time
import traceback
from importlib import import_module

import torch

from sigmoe.launch import session
from sigmoe.launch.main import main

RANKS = 2
# What the survivor of a killed rank has left before it is killed too, as a launcher would.
GRACE = 1.0


def load():
    """Import what the ranks need. Before any operation of torch, so that no thread is lost in a fork."""
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in ("launch.train", "launch.compose", "parallel.megatron", "parallel.parallelize", "parallel.zero"):
        import_module(f"sigmoe.{name}")
    import_module("torch._dynamo")


def start(folder, overrides, arrange=lambda rank: None):
    """Fork the ranks, each of which calls `arrange` first; their words go to `words-RANK`. Returns process ids."""
    folder.mkdir(exist_ok=True, parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            _run(folder, overrides, arrange, rank, port)
        pids.append(pid)
    return pids


def _run(folder, overrides, arrange, rank, port):
    code = 1
    try:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        words = os.open(folder / f"words-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(words, 1)
        os.dup2(words, 2)
        os.chdir(folder)
        session.matmul_rate = lambda device, dtype: 1.0  # a third of a second that only scales a reported share
        arrange(rank)
        code = main(["train", *overrides, "out=run"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(pids, limit=60):
    """Wait for the ranks; when one fails, the others have GRACE seconds left. Returns exit statuses (-9: killed)."""
    left, status, deadline = dict(enumerate(pids)), [None] * len(pids), time.monotonic() + limit
    while left:
        for rank, pid in list(left.items()):
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                status[rank] = os.waitstatus_to_exitcode(code)
                del left[rank]
                if status[rank]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for pid in left.values():
                os.kill(pid, 9)
            deadline = float("inf")
        time.sleep(0.005)
    return status


def words(folder):
    """The end of what the ranks said."""
    return "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("words-*")))
