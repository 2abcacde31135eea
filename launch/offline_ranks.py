"""The processes of an offline command under mpirun: what they tell each other, and that all fail together.

The only file that imports mpi4py, and only where mpirun started several processes. Plain data goes around as JSON in
host memory, never pickled.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..parallel.agreement import first_error
from .launcher import find_mpi

T = TypeVar("T")


class OfflineRanks:
    """This process, number `rank` of `size`. Every method is called by all, in the same order."""

    def __init__(self, communicator: Any | None) -> None:
        self._communicator = communicator
        self.rank: int = 0 if communicator is None else communicator.Get_rank()
        self.size: int = 1 if communicator is None else communicator.Get_size()
        self.told: Exception | None = None  # what all raised together

    def exchange(self, data: Any) -> list[Any]:
        """Return everyone's `data`, plain JSON data, by rank."""
        if self._communicator is None:
            return [data]
        return [json.loads(text) for text in self._all_bytes(json.dumps(data).encode())]

    def gather(self, vectors: list[Tensor]) -> list[Tensor]:
        """Return everyone's float64 vectors, in the order of the ranks."""
        if self._communicator is None:
            return vectors
        lengths = [length for some in self.exchange([len(vector) for vector in vectors]) for length in some]
        mine = torch.cat([torch.empty(0, dtype=torch.float64), *vectors])
        everyone = b"".join(self._all_bytes(mine.numpy().tobytes()))
        joined = torch.frombuffer(bytearray(everyone), dtype=torch.float64) if everyone else mine
        return list(torch.split(joined, lengths))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block in which nobody waits for another; what it raises on one, all raise (the lowest rank's, named).

        Covers ValueError and OSError.
        """
        if self._communicator is None:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as caught:
            error = caught
        self.told = first_error(error, self.exchange)
        if self.told is not None:
            raise self.told from error

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make`, called by rank 0 alone, returns (plain JSON data), or raise on all what it raises."""
        made: list[T] = []
        with self.together():
            if self.rank == 0:
                made.append(make())
        result: list[T] = self.exchange(made)[0]
        return result[0]

    def _all_bytes(self, mine: bytes) -> list[bytes]:
        assert self._communicator is not None
        sizes = torch.empty(self.size, dtype=torch.int64).numpy()
        self._communicator.Allgather(torch.tensor([len(mine)]).numpy(), sizes)
        joined = bytearray(int(sizes.sum()))
        self._communicator.Allgatherv(mine, [joined, sizes.tolist()])
        ends = sizes.cumsum().tolist()
        return [bytes(joined[end - size : end]) for end, size in zip(ends, sizes.tolist())]


@contextmanager
def offline_ranks() -> Iterator[OfflineRanks]:
    """Yield the processes that mpirun started, or this one alone.

    Where one of them fails by itself, the others, who would wait for it for ever, are ended. Raises ValueError under
    mpirun without mpi4py.
    """
    if find_mpi() is None:
        yield OfflineRanks(None)
        return
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError("mpirun needs mpi4py: pip install mpi4py, or start one process without mpirun") from error
    ranks = OfflineRanks(MPI.COMM_WORLD)
    try:
        yield ranks
    except BaseException as error:
        if error is not ranks.told:
            # What this rank prints by way of sys.stderr may be silenced.
            print(f"rank {ranks.rank}: {type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
            MPI.COMM_WORLD.Abort(1)
        raise
