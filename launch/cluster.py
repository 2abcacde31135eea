"""How the processes of a run find each other, and leave."""

import os
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..parallel.mesh import Axis
from .launcher import Cluster

# How long a process with bad news waits until rank 0 has told it.
_LEAVE_SECONDS = 20


def join(cluster: Cluster, timeout: float) -> Axis:
    """Start torch.distributed: gloo for host memory, NCCL for GPUs. Nobody waits longer than `timeout` seconds."""
    if torch.cuda.is_available():
        torch.cuda.set_device(cluster.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed looks for one, and logs what it finds
        backend = "gloo"
    # torch 2.13 warns of it; the name that it wants instead is unknown to torch 2.11.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    distributed.init_process_group(
        backend,
        store=PrefixStore("run", _store(cluster)),
        rank=cluster.rank,
        world_size=cluster.size,
        timeout=timedelta(seconds=timeout),
    )
    return Axis(group=distributed.group.WORLD, rank=cluster.rank, size=cluster.size)


def leave(cluster: Cluster, code: int) -> tuple[int, bool]:
    """End this process's part; return the exit code of all, and whether rank 0 has told the user why.

    Rank 0 calls it when its words are printed: a launcher stops everybody as soon as the first one fails.
    """
    # A launcher sends it to all as soon as one has left; each is to end with its own code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    told = cluster.rank == 0 or code == 0
    with suppress(distributed.DistError, RuntimeError):  # rank 0 may have hosted the store, and be gone
        store = _store(cluster)
        if cluster.rank == 0:
            store.set("left", str(code))
        elif code:
            store.wait(["left"], timedelta(seconds=_LEAVE_SECONDS))
            told = True
            code = int(store.get("left")) or code
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return code, told


@contextmanager
def only_first_speaks(cluster: Cluster) -> Iterator[None]:
    """Let what other ranks than the first print vanish."""
    if cluster.rank == 0:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def lost_peer(error: RuntimeError) -> str | None:
    """Return a line where an operation failed because another process is gone, or did not answer in time."""
    text = " ".join(str(error).split())
    if not isinstance(error, distributed.DistError) and "gloo" not in text:
        return None
    why = re.sub(r"^\[[^]]*\] ", "", text).partition(". ")[0]
    return f"another process is gone or does not answer ({why:.120}): run again to go on from the newest checkpoint"


def _store(cluster: Cluster) -> Store:
    store: Store
    store, _, _ = next(rendezvous("env://", cluster.rank, cluster.size))
    return store
