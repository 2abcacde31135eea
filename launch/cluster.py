"""How the processes of a run find each other, and leave."""

import fcntl
import json
import os
import re
import signal
import socket
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
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
_SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's address
_BYTES = 512  # of rank 0's address and port


def agree(cluster: Cluster) -> Cluster:
    """Return the cluster with rank 0's address, and the ranks of each machine, which mpirun leaves to MPI.

    All call it, before anything else: MPI ends here. Raises ValueError where mpi4py lacks or belongs to another MPI.
    """
    if cluster.launcher != "mpirun":
        return cluster
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError("mpirun needs mpi4py: pip install mpi4py, or start with torchrun") from error
    world = MPI.COMM_WORLD
    if world.Get_size() != cluster.size:
        raise ValueError(
            f"mpirun started {cluster.size} processes, and mpi4py sees {world.Get_size()}: it was built for another "
            "MPI than this mpirun; use that one's mpirun, or start with torchrun"
        )
    machine = world.Split_type(MPI.COMM_TYPE_SHARED)
    found = bytearray(_BYTES)
    if cluster.rank == 0:
        told = json.dumps(_own_address(alone=machine.Get_size() == cluster.size)).encode()
        found[: len(told)] = told
    world.Bcast(found, root=0)
    address, port, wrong = json.loads(found.rstrip(b"\0"))
    local_rank, local_size = machine.Get_rank(), machine.Get_size()
    machine.Free()
    # Now, while all are alive: at exit it would wait for those that are not.
    MPI.Finalize()
    if wrong is not None:
        raise ValueError(wrong)
    return replace(cluster, address=address, port=port, local_rank=local_rank, local_size=local_size)


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


def lost_peer(error: RuntimeError) -> str | None:
    """Return a line where an operation failed because another process is gone, or did not answer in time."""
    if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
        return None
    why = plain_words(error)
    return f"another process is gone or does not answer ({why:.120}): run again to go on from the newest checkpoint"


def plain_words(error: BaseException) -> str:
    """Return the first sentence of what another library says, in one line, without the place in its source."""
    return re.sub(r"^\[[^]]*\] ", "", " ".join(str(error).split())).partition(". ")[0]


def _own_address(*, alone: bool) -> tuple[str, int, str | None]:
    """Return an address of this machine that the others reach, a free port, and what is wrong with them.

    MASTER_ADDR and MASTER_PORT where they are given; else the interface that gloo is to use, or the default route's.
    """
    given = {key: os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")}
    interface = given["GLOO_SOCKET_IFNAME"].partition(",")[0]
    try:
        address = given["MASTER_ADDR"] or ("127.0.0.1" if alone else "")
        if not address:
            address = _interface_address(interface) if interface else _default_address()
        with socket.socket() as free:
            free.bind(("", int(given["MASTER_PORT"] or 0)))
            return address, free.getsockname()[1], None
    except (OSError, ValueError, OverflowError) as error:
        named = ", ".join(f"{key}={value}" for key, value in given.items() if value)
        return (
            "",
            0,
            f"rank 0 has no address and port for the others ({error}): set or mend {named or 'MASTER_ADDR'}"[:400],
        )


def _interface_address(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("256s", name.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, asked)[20:24])


def _default_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # no packet leaves; an address that is nobody's (RFC 5737)
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
