"""How the processes of a run come together: rank 0's address, a roll call, and one all-reduce, under a time limit.

Before anything heavy is built, so that a wrong name, a closed port or a rank that never came is one line after two
minutes and not a hung job after ten.
"""

import errno
import json
import socket
import time
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store

from .console import notes
from .launcher import Cluster, UnreachableError
from .lost_peer import plain_words

# How much longer the others wait for rank 0's word than rank 0 for them.
_GRACE = 15.0
_HINT = "check that no firewall is between, and that MASTER_ADDR and MASTER_PORT are rank 0's"
_INTERFACES = "check that no firewall is between, and that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the right one"


def open_store(cluster: Cluster, seconds: float) -> Store:
    """Return the store that all processes share, served by rank 0 or the launcher. Raises UnreachableError."""
    serving = cluster.rank == 0 and not cluster.launcher_keeps_store
    try:
        left = _wait_for(cluster, seconds, connect=not serving)
        if serving and not _is_own(cluster):
            notes().print(f"{_foreign(cluster)} (unless it is forwarded here)")
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1" if serving else cluster.address,  # a wrong address is told, by the roll, without a C++ trace
            cluster.port,
            cluster.size,
            is_master=serving,
            timeout=timedelta(seconds=left),
            wait_for_workers=False,
            multi_tenant=True,  # opened again to leave
        )
    except distributed.DistError as error:
        hint = "another job may have the port: give another MASTER_PORT" if serving else _HINT
        raise UnreachableError(
            f"{_who(cluster)} cannot {'serve' if serving else 'use'} it ({plain_words(error)}): {hint}"
        ) from error
    return PrefixStore(f"sigmoe/{cluster.attempt}", store)


def call_roll(store: Store, cluster: Cluster, seconds: float) -> list[str]:
    """Return every rank's host name when all are there; raise ValueError, on those that are, where some are not."""
    try:
        store.set(f"host/{cluster.rank}", socket.gethostname())
        if cluster.rank == 0:
            store.set("roll", json.dumps(_hosts(store, cluster.size, seconds)))
        store.wait(["roll"], timedelta(seconds=seconds + _GRACE))
        hosts: list[str | None] = json.loads(store.get("roll"))
    except distributed.DistError as error:
        raise UnreachableError(f"{_who(cluster)} lost it ({plain_words(error)}): {_HINT}") from error
    missing = [rank for rank, host in enumerate(hosts) if host is None]
    if missing:
        raise ValueError(
            f"{cluster.size - len(missing)} of {cluster.size} ranks came to {_place(cluster)} within {seconds:g} s; "
            f"{_named(missing)} did not: look at what they printed, and "
            + (_HINT if cluster.rank > 0 or cluster.launcher_keeps_store or _is_own(cluster) else _foreign(cluster))
        )
    return [host for host in hosts if host is not None]


def try_all_reduce(store: Store, cluster: Cluster, device: str, seconds: float) -> None:
    """Sum over all ranks once, in a group that ends with it: its limit is not the run's. Raises ValueError."""
    on_gpu = device == "cuda"
    start = time.monotonic()
    try:
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=PrefixStore(f"check-{device}", store),
            rank=cluster.rank,
            world_size=cluster.size,
            # gloo (torch 2.13) waits five times as long for others to connect to it.
            timeout=timedelta(seconds=seconds if on_gpu else max(seconds / 5, 1)),
        )
        total = torch.ones(1, device=device)
        distributed.all_reduce(total)
        if int(total) != cluster.size:
            raise ValueError(f"{_who(cluster)}: {cluster.size} ranks added 1 and got {int(total)}")
        distributed.destroy_process_group()
    except RuntimeError as error:
        waited = f"{time.monotonic() - start:.0f} s"
        told = f"{_who(cluster)} reaches it, but not all other ranks: it gave up after {waited} ({plain_words(error)})"
        raise ValueError(f"{told}: {_INTERFACES}") from error


def rank_map(cluster: Cluster, hosts: list[str]) -> list[str]:
    """Return the lines that say which ranks are where: a title, and one a host."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    counted = f"{len(ranks)} host" + "s" * (len(ranks) > 1)
    lines = [f"{cluster.launcher} started {cluster.size} ranks on {counted}, which meet at {_place(cluster)}"]
    return lines + [f"  {host}: {_named(some)}" for host, some in ranks.items()]


def _wait_for(cluster: Cluster, seconds: float, *, connect: bool) -> float:
    """Return the seconds left (1 at least) when the address resolves, and, where asked, its port takes connections.

    By plain sockets: TCPStore prints a trace of C++ for each attempt that fails.
    """
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            socket.getaddrinfo(cluster.address, cluster.port)
            if connect:
                socket.create_connection((cluster.address, cluster.port), timeout=max(min(left, 5), 0.1)).close()
            return max(left, 1)
        except OSError as error:
            if left <= 0:
                unknown = isinstance(error, socket.gaierror)
                what, hint = ("resolve its name", "give an address as MASTER_ADDR") if unknown else ("connect", _HINT)
                told = f"{_who(cluster)} could not {what} within {seconds:g} s ({error.strerror or error}): {hint}"
                raise UnreachableError(told) from error
        time.sleep(0.2)


def _hosts(store: Store, size: int, seconds: float) -> list[str | None]:
    """Return the hosts of the ranks that came in time, None for the others."""
    deadline = time.monotonic() + seconds
    hosts: list[str | None] = [None] * size
    while None in hosts:
        for rank in [rank for rank, host in enumerate(hosts) if host is None]:
            if store.check([f"host/{rank}"]):
                hosts[rank] = store.get(f"host/{rank}").decode()
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return hosts


def _is_own(cluster: Cluster) -> bool:
    """Return whether the address is this machine's; where it is not, it may still be forwarded here."""
    for family, kind, _, _, place in socket.getaddrinfo(cluster.address, 0, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind) as probe:
                probe.bind(place)
            return True
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                return True
    return False


def _foreign(cluster: Cluster) -> str:
    return f"{cluster.address} is no address of {socket.gethostname()}, where rank 0 is: mend MASTER_ADDR"


def _place(cluster: Cluster) -> str:
    return f"{cluster.address}:{cluster.port}"


def _who(cluster: Cluster) -> str:
    """Return the beginning of a line about rank 0's address."""
    return f"rank 0's address is {_place(cluster)}, and rank {cluster.rank} on {socket.gethostname()}"


def _named(ranks: list[int]) -> str:
    """Return `ranks 0-3,6` of [0, 1, 2, 3, 6]."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
