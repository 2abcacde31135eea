"""Which of a run's processes this is, by the launcher's environment. Imports nothing heavy.

Asked in this order, since the first may run inside the last: torchrun, deepspeed, mpirun, srun. Half of a launcher's
environment is an error: many processes that each believe to be alone would write over each other.

torchrun may start killed ranks again (--max-restarts). Its store then keeps what the dead wrote (torch 2.13), and
every attempt needs names of its own. Under --rdzv-backend=c10d the nodes' counts of attempts may part: there
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every attempt a store of its own.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_STEP = (
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
)
# Slurm's own steps, such as the shell of a batch job or of salloc, have ids from here on (slurm.h).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Below the ports that Linux hands out by itself, so that rank 0 finds it free.
_FIRST_PORT, _NUM_PORTS = 12_000, 20_000


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """This process among those that a launcher started."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str = ""  # where rank 0 is; mpirun does not say (`mpi.agree` does)
    port: int = 0
    attempt: int = 0  # how often torchrun, whose store stays, has started its processes again
    launcher_keeps_store: bool = False  # else rank 0 serves the address

    def __post_init__(self) -> None:
        for low, high in ((self.rank, self.size), (self.local_rank, self.local_size), (self.local_size - 1, self.size)):
            if not 0 <= low < high:
                raise ValueError(
                    f"{self.launcher} says rank {self.rank} of {self.size}, and on its machine {self.local_rank} of "
                    f"{self.local_size}, which do not fit: start again with {self.launcher}"
                )


class UnreachableError(ValueError):
    """Rank 0 cannot be reached: this process cannot tell it, and speaks for itself."""


def find_cluster(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """Return what the launcher says; None where there is none, or it started one process.

    Raises ValueError that names the variable which is missing or no number.
    """
    if any(key in environment for key in _RANKS):
        return _by_torchrun_or_deepspeed(environment)
    mpi, step = find_mpi(environment), _by_srun(environment)
    # srun --mpi=pmi2 speaks to its tasks as MPICH's mpirun does, and knows their addresses as well.
    if mpi is None or (step is not None and (step.rank, step.size) == (mpi.rank, mpi.size)):
        return step
    return mpi


def find_mpi(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """Return what mpirun says (Open MPI, or by PMI that of MPICH and Intel); None where it started one process.

    Ranks on the same machine, and rank 0's address, are not known from the environment. Raises ValueError for a half.
    """
    for keys in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        if any(key in environment for key in keys):
            rank, size = _numbers(environment, keys, "mpirun")
            if size > 1:
                return Cluster(launcher="mpirun", rank=rank, size=size, local_rank=0, local_size=1)
    return None


def launch_command(processes: int, command: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the line that starts `command` again on so many processes: srun's in a Slurm job, else torchrun's."""
    if sys.argv[1:2] == [command]:
        words = sys.argv[2:]
    else:
        words = sys.argv[1:] if Path(sys.argv[0]).stem == command else ["key=value", "..."]
    if "SLURM_JOB_ID" in environment:
        start = ["srun", "--ntasks", str(processes), "python"]
    else:
        start = ["torchrun", "--standalone", "--nproc-per-node", str(processes)]
    return shlex.join([*start, "-m", f"sigmoe.launch.{command}", *words])


def _by_torchrun_or_deepspeed(environment: Mapping[str, str]) -> Cluster | None:
    """Both set torch's variables; deepspeed 0.19 names the ranks of a machine LOCAL_SIZE."""
    by_deepspeed = "LOCAL_WORLD_SIZE" not in environment and "LOCAL_SIZE" in environment
    launcher = "deepspeed" if by_deepspeed else "torchrun"
    keys = (*_RANKS[:3], "LOCAL_SIZE" if by_deepspeed else "LOCAL_WORLD_SIZE")
    _require(environment, (*keys, "MASTER_ADDR", "MASTER_PORT"), "a launcher", f"use {launcher}")
    rank, size, local_rank, local_size, port = _numbers(environment, (*keys, "MASTER_PORT"), launcher)
    keeps_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    cluster = Cluster(
        launcher=launcher,
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        address=environment["MASTER_ADDR"],
        port=port,
        attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) if keeps_store else 0,
        launcher_keeps_store=keeps_store,
    )
    return cluster if size > 1 else None


def _by_srun(environment: Mapping[str, str]) -> Cluster | None:
    """Read srun's step; the shell of sbatch or salloc is none, though it has SLURM_JOB_ID and even SLURM_PROCID=0."""
    if not any(key in environment for key in _STEP[:2]):
        if environment.get("SLURM_PROCID", "0") != "0":  # a task, though its step's variables are gone
            _require(environment, ("SLURM_PROCID", *_STEP[:2]), "srun", "use srun")
        return None
    _require(environment, _STEP, "srun", "use srun")
    step, size, rank, local_rank, node, job = _numbers(environment, (*_STEP[:5], "SLURM_JOB_ID"), "srun")
    if size == 1 or step >= _FIRST_SPECIAL_STEP:
        return None
    tasks = _tasks_by_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    if node >= len(tasks):
        told = environment["SLURM_STEP_TASKS_PER_NODE"]
        raise ValueError(f"SLURM_NODEID is {node} and SLURM_STEP_TASKS_PER_NODE {told!r}, which do not fit: use srun")
    port = _FIRST_PORT + (16 * job + step % 16) % _NUM_PORTS  # jobs may share a node, and steps of a job as well
    if "MASTER_PORT" in environment:
        (port,) = _numbers(environment, ("MASTER_PORT",), "srun")
    return Cluster(
        launcher="srun",
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=tasks[node],
        address=environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"]),
        port=port,
    )


def _first_host(nodes: str) -> str:
    """Return `node07` of Slurm's `node[07-09,12],other`: where rank 0 is, unless srun was told otherwise."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no host: use srun")
    return re.sub(r"\[([^\]]*)\]", lambda ranges: re.split("[-,]", ranges[1])[0], first[0])


def _tasks_by_node(text: str) -> list[int]:
    """Return [2, 2, 1] of Slurm's `2(x2),1`."""
    tasks = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, which cannot be read: use srun")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks


def _require(environment: Mapping[str, str], keys: Sequence[str], launcher: str, remedy: str) -> None:
    there = [key for key in keys if key in environment]
    for key in keys:
        if not environment.get(key):
            raise ValueError(f"{there[0]} is set, as by {launcher}, but {key} is not: {remedy}, or unset {there[0]}")


def _numbers(environment: Mapping[str, str], keys: Sequence[str], launcher: str) -> list[int]:
    _require(environment, keys, launcher, f"use {launcher}")
    for key in keys:
        if not environment[key].isdecimal():
            raise ValueError(f"{key} is {environment[key]!r}, which is no whole number: use {launcher}")
    return [int(environment[key]) for key in keys]
