"""Coming together: who cannot, and who never came, is told in one line that names host, port and rank."""

import re
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from sigmoe.launch.launcher import Cluster, UnreachableError
from sigmoe.launch.rendezvous import call_roll, open_store, rank_map


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def member(rank, size, port, **changes):
    settings = {"local_rank": 0, "local_size": 1, "address": "127.0.0.1", "port": port}
    return Cluster(launcher="srun", rank=rank, size=size, **(settings | changes))


def come(cluster, seconds):
    """What a rank hears at the roll call; its store, to keep it, and the hosts or the error."""
    try:
        store = open_store(cluster, seconds)
        return store, call_roll(store, cluster, seconds)
    except ValueError as error:
        return None, error


def call(ranks, size, port, seconds):
    with ThreadPoolExecutor(len(ranks)) as pool:
        came = list(pool.map(lambda rank: come(member(rank, size, port), seconds), ranks))
    return [heard for _, heard in came]


def test_all_who_come_know_all_hosts(port):
    assert call([0, 1, 2], 3, port, 60) == [[socket.gethostname()] * 3] * 3


def test_who_never_came_is_named_to_who_came(port):
    heard = call([0, 2], 5, port, 1)
    for error in heard:
        assert isinstance(error, ValueError) and not isinstance(error, UnreachableError)
        assert re.match(rf"2 of 5 ranks came to 127.0.0.1:{port} within 1 s; ranks 1,3-4 did not: look at", str(error))
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {},
            r"127.0.0.1:\d+, and rank 1 on \S+ could not connect within 0.3 s \(Connection refused\): check .*firewall",
        ),
        (
            {"address": "no.such.host.invalid"},
            r"no.such.host.invalid:\d+, and rank 1 .* could not resolve its name .*: give an address as MASTER_ADDR\Z",
        ),
    ],
)
def test_who_cannot_reach_rank_0_says_so(port, changes, told):
    with pytest.raises(UnreachableError, match=r"\Arank 0's address is " + told) as caught:
        open_store(member(1, 2, port, **changes), 0.3)
    assert "MASTER_ADDR" in str(caught.value) and "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_told(port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(UnreachableError, match=rf"127.0.0.1:{port}, and rank 0 .* cannot serve it .*MASTER_PORT"):
            open_store(member(0, 2, port), 2)


def test_rank_0_says_at_once_that_the_address_is_not_its_own(port, capfd):
    heard = come(member(0, 2, port, address="192.0.2.1"), 0.5)[1]  # nobody's address (RFC 5737)
    mend = f"192.0.2.1 is no address of {socket.gethostname()}, where rank 0 is: mend MASTER_ADDR"
    noted = capfd.readouterr()
    assert f"{mend} (unless it is forwarded here)" in " ".join((noted.out + noted.err).split())
    assert str(heard) == (
        f"1 of 2 ranks came to 192.0.2.1:{port} within 0.5 s; rank 1 did not: look at what they printed, and {mend}"
    )


def test_ranks_that_torchrun_starts_again_do_not_meet_their_ghosts(port):
    served = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    first, second = (
        open_store(member(0, 1, port, launcher_keeps_store=True, attempt=attempt), 5) for attempt in range(2)
    )
    first.set("left", "1")
    assert first.check(["left"]) and not second.check(["left"])
    del served


def test_the_map_has_a_line_a_host():
    hosts = ["a", "a", "b", "a", "c", "c", "c"]
    cluster = Cluster(launcher="srun", rank=0, size=7, local_rank=0, local_size=3, address="a", port=1234)
    assert rank_map(cluster, hosts) == [
        "srun started 7 ranks on 3 hosts, which meet at a:1234",
        "  a: ranks 0-1,3",
        "  b: rank 2",
        "  c: ranks 4-6",
    ]
