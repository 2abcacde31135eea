"""Which of a run's processes this is, by the launcher's environment. Imports nothing heavy.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without the first four there
is one process. If torchrun itself is to start killed ranks again, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it
(torch 2.13: with its shared store gloo may not come up a second time).
"""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_KEYS = (*_RANKS, "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """This process among those that a launcher started."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def find_cluster(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """Return what the launcher says; None where there is none, or it started one process.

    Raises ValueError that names the variable which is missing or no number.
    """
    if not any(key in environment for key in _RANKS):
        return None
    missing = [key for key in _KEYS if not environment.get(key)]
    if missing:
        there = next(key for key in _RANKS if key in environment)
        raise ValueError(f"{there} is set, as by a launcher, but {missing[0]} is not: use torchrun, or unset {there}")
    numbers = {}
    for key in (*_RANKS, "MASTER_PORT"):
        if not environment[key].isdecimal():
            raise ValueError(f"{key} is {environment[key]!r}, which is no whole number: use torchrun")
        numbers[key] = int(environment[key])
    for low, high in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
        if numbers[low] >= numbers[high] + (low == "LOCAL_WORLD_SIZE"):
            raise ValueError(f"{low} is {numbers[low]} and {high} is {numbers[high]}, which do not fit: use torchrun")
    if numbers["WORLD_SIZE"] == 1:
        return None
    rank, size, local_rank, local_size = (numbers[key] for key in _RANKS)
    return Cluster(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


def find_mpi(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """Return what mpirun says (Open MPI, or by PMI that of MPICH and Intel); None where it started one process."""
    for rank, size in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        if environment.get(size, "").isdecimal() and environment.get(rank, "").isdecimal():
            numbers = int(environment[rank]), int(environment[size])
            if numbers[1] > 1:
                return Cluster(rank=numbers[0], size=numbers[1], local_rank=0, local_size=1)
    return None


def torchrun_command(processes: int, command: str) -> str:
    """Return the line that starts `command` again on so many processes of this machine."""
    if sys.argv[1:2] == [command]:
        words = sys.argv[2:]
    else:
        words = sys.argv[1:] if Path(sys.argv[0]).stem == command else ["key=value", "..."]
    module = ["-m", f"sigmoe.launch.{command}"]
    return shlex.join(["torchrun", "--standalone", "--nproc-per-node", str(processes), *module, *words])
