"""MPI, where mpirun started several processes: that mpi4py belongs to that mpirun, and what `train` asks of it.

The only file that imports mpi4py.
"""

import fcntl
import json
import os
import socket
import struct
import sys
from dataclasses import replace
from typing import Any

from .launcher import Cluster

_SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's address
_BYTES = 512  # of rank 0's address and port


def load_mpi(cluster: Cluster, remedy: str) -> Any:
    """Return mpi4py's MPI; raise ValueError, which ends with `remedy`, where it lacks or belongs to another MPI."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError(f"mpirun needs mpi4py: pip install mpi4py, or {remedy}") from error
    seen = MPI.COMM_WORLD.Get_size()
    if seen != cluster.size:
        raise ValueError(
            f"mpirun started {cluster.size} processes, and mpi4py sees {seen}: it was built for another MPI than this "
            f"mpirun; use that one's mpirun, or {remedy}"
        )
    return MPI


def agree(cluster: Cluster) -> Cluster:
    """Return the cluster with rank 0's address, and the ranks of each machine, which mpirun leaves to MPI.

    All call it, before anything else: MPI ends here. Raises ValueError where mpi4py does not fit (`load_mpi`), or rank
    0 has no address; where MPI itself fails, ends the whole job with a line and code 2.
    """
    if cluster.launcher != "mpirun":
        return cluster
    MPI = load_mpi(cluster, "start with torchrun")
    try:
        return _agree(cluster, MPI)
    except MPI.Exception as error:
        # The others wait inside MPI, and at exit so would this one.
        told = f"rank {cluster.rank} on {socket.gethostname()} cannot speak MPI with the others ({error})"
        print(f"sigmoe train: {told}: has every node a host name of its own?", file=sys.stderr, flush=True)  # noqa: T201
        MPI.COMM_WORLD.Abort(2)
        raise


def _agree(cluster: Cluster, MPI: Any) -> Cluster:
    machine = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    found = bytearray(_BYTES)
    if cluster.rank == 0:
        told = json.dumps(_own_address(alone=machine.Get_size() == cluster.size)).encode()
        found[: len(told)] = told
    MPI.COMM_WORLD.Bcast(found, root=0)
    address, port, wrong = json.loads(found.rstrip(b"\0"))
    local_rank, local_size = machine.Get_rank(), machine.Get_size()
    machine.Free()
    # Now, while all are alive: at exit it would wait for those that are not.
    MPI.Finalize()
    if wrong is not None:
        raise ValueError(wrong)
    return replace(cluster, address=address, port=port, local_rank=local_rank, local_size=local_size)


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
        wrong = f"rank 0 has no address and port for the others ({error}): set or mend {named or 'MASTER_ADDR'}"
        return "", 0, wrong[:400]


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
