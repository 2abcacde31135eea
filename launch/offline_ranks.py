"""Workers that mpirun started: what the processes of an offline command tell each other, and that all fail together.

Plain data goes around as JSON in host memory, never pickled.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..moe.workers import ALONE, Workers
from .launcher import find_mpi
from .mpi import load_mpi

_NAP = 0.001  # seconds


class OfflineRanks(Workers):
    """The processes of mpirun."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.rank = communicator.Get_rank()
        self.size = communicator.Get_size()

    def exchange(self, data: Any) -> list[Any]:
        """Return everyone's `data`, plain JSON data, by rank."""
        return [json.loads(text) for text in self._all_bytes(json.dumps(data).encode())]

    def gather(self, vectors: list[Tensor]) -> list[Tensor]:
        """Return everyone's float64 vectors, in the order of the ranks."""
        lengths = [length for some in self.exchange([len(vector) for vector in vectors]) for length in some]
        mine = torch.cat([torch.empty(0, dtype=torch.float64), *vectors])
        everyone = b"".join(self._all_bytes(mine.numpy().tobytes()))
        joined = torch.frombuffer(bytearray(everyone), dtype=torch.float64) if everyone else mine
        return list(torch.split(joined, lengths))

    def _all_bytes(self, mine: bytes) -> list[bytes]:
        sizes = torch.empty(self.size, dtype=torch.int64).numpy()
        # Others may be at work for long: a rank that waits for them in MPI would keep a core busy.
        arrived = self._communicator.Iallgather(torch.tensor([len(mine)]).numpy(), sizes)
        while not arrived.Test():
            time.sleep(_NAP)
        joined = bytearray(int(sizes.sum()))
        self._communicator.Allgatherv(mine, [joined, sizes.tolist()])
        ends = sizes.cumsum().tolist()
        return [bytes(joined[end - size : end]) for end, size in zip(ends, sizes.tolist())]


@contextmanager
def offline_ranks() -> Iterator[Workers]:
    """Yield the processes that mpirun started, or this one alone.

    Where one of them fails by itself, the others, who would wait for it for ever, are ended. Raises ValueError where
    mpi4py lacks or belongs to another MPI: the processes would write over each other.
    """
    cluster = find_mpi()
    if cluster is None:
        yield ALONE
        return
    MPI = load_mpi(cluster, "start one process without mpirun")
    ranks = OfflineRanks(MPI.COMM_WORLD)
    try:
        yield ranks
    except BaseException as error:
        if error is not ranks.told:
            # What this rank prints by way of sys.stderr may be silenced.
            print(f"rank {ranks.rank}: {type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
            MPI.COMM_WORLD.Abort(1)
        raise
