"""How the processes of a run join each other, and leave."""

import json
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store

from ..parallel.config import ParallelConfig
from ..parallel.mesh import Axis
from .console import notes
from .launcher import Cluster, UnreachableError
from .rendezvous import call_roll, open_store, rank_map, try_all_reduce

# How long a process with bad news waits until rank 0 has told it, and rank 0 until the others have heard it.
_LEAVE_SECONDS = 20.0


class Peers:
    """All processes of the run, as this one sees them; it keeps their store, which rank 0 serves, up to the end."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._store: Store | None = None

    def join(self, config: ParallelConfig) -> Axis:
        """Start torch.distributed: gloo for host memory, NCCL for GPUs; rank 0 prints who is where.

        Nobody waits longer than `config.join_timeout` for it, nor later than `config.timeout`. Raises ValueError.
        """
        cluster, seconds = self.cluster, config.join_timeout
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(cluster.local_rank)
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed looks for one, and logs what it finds
        # torch 2.13 warns of it; the name that it wants instead is unknown to torch 2.11.
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
        self._store = open_store(cluster, seconds)
        hosts = call_roll(self._store, cluster, seconds)
        if cluster.rank == 0:
            notes().print("\n".join(rank_map(cluster, hosts)))
        for device in ("cpu", "cuda") if on_gpu else ("cpu",):
            try_all_reduce(self._store, cluster, device, seconds)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=PrefixStore("run", self._store),
            rank=cluster.rank,
            world_size=cluster.size,
            timeout=timedelta(seconds=config.timeout),
        )
        return Axis(group=distributed.group.WORLD, rank=cluster.rank, size=cluster.size)

    def leave(self, code: int) -> tuple[int, bool]:
        """End this process's part; return the exit code of all, and whether rank 0 has told the user why.

        Rank 0 calls it when its words are printed: a launcher stops everybody as soon as the first one fails.
        """
        # A launcher sends it to all as soon as one has left; each is to end with its own code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        told = self.cluster.rank == 0 or code == 0
        with suppress(distributed.DistError, UnreachableError):  # who serves the store may be gone
            if code and self.cluster.rank > 0:
                code = self._hear(code)
                told = True
            elif code or self._store is not None:
                self._tell(code)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        return code, told

    def _tell(self, code: int) -> None:
        """As rank 0, say the code, and keep the store up until all others that came have heard it, or are too late."""
        if self.cluster.rank > 0:
            return
        store = self._store or open_store(self.cluster, _LEAVE_SECONDS)
        store.set("left", str(code))
        if not code or self.cluster.launcher_keeps_store:
            return
        others = self.cluster.size - 1
        if store.check(["roll"]):
            others = sum(host is not None for host in json.loads(store.get("roll"))) - 1
        deadline = time.monotonic() + _LEAVE_SECONDS
        while store.add("heard", 0) < others and time.monotonic() < deadline:
            time.sleep(0.05)

    def _hear(self, code: int) -> int:
        """Return rank 0's code, or this one's where it left well."""
        # By a new connection: an operation on one that was cut off would wait for ever (torch 2.13).
        store = open_store(self.cluster, _LEAVE_SECONDS)
        store.wait(["left"], timedelta(seconds=_LEAVE_SECONDS))
        code = int(store.get("left")) or code
        store.add("heard", 1)
        return code


@contextmanager
def only_first_speaks(cluster: Cluster) -> Iterator[None]:
    """Let what other ranks than the first print vanish."""
    if cluster.rank == 0:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
