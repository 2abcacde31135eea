"""What the watchdog says, and what it takes for a move."""

import socket
import threading
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
from torch import distributed

from sigmoe.launch.launcher import Cluster
from sigmoe.launch.notice_board import Answer
from sigmoe.launch.rendezvous import open_store
from sigmoe.launch.stacks import dump_stacks, find_place
from sigmoe.launch.watchdog import Watchdog, describe
from sigmoe.parallel.config import ParallelConfig


def answer(line, collective=None, doing="step 3"):
    return Answer(stands=True, doing=doing, collective=collective, line=line)


def test_who_is_to_blame_comes_first_and_equals_in_one_breath():
    waits = answer("parallel/collectives.py:17", "all_reduce")
    told = describe([waits, answer("data/reader.py:9"), waits, None])
    assert told == (
        "rank 3 does not answer; rank 1 (step 3) sits at data/reader.py:9; "
        "rank 0, 2 (step 3) waits in all_reduce, parallel/collectives.py:17"
    )


def test_a_thousand_ranks_are_one_line():
    told = describe([answer("a.py:1", "barrier")] * 1000)
    assert told == "rank 0, 1, 2, 3, 4, 5, 6, 7 and 992 more (step 3) waits in barrier, a.py:1"


def seen_from_another_thread():
    """Where the main thread is, as it waits here for the one that looks."""
    found = []
    thread = threading.Thread(target=lambda: found.append(find_place()))
    thread.start()
    thread.join()
    return found[0]


def test_the_main_thread_is_found():
    place = seen_from_another_thread()
    assert place.collective is None
    waits, _, caller = place.line.partition(", called from ")
    assert "threading.py:" in waits
    assert caller.startswith("launch/test_watchdog.py:")


def test_a_collective_is_found_where_it_is_called(tmp_path, monkeypatch):
    options, found = distributed.distributed_c10d.AllreduceOptions, []

    def looked_at():
        found.append(seen_from_another_thread())
        return options()

    monkeypatch.setattr(distributed.distributed_c10d, "AllreduceOptions", looked_at)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        distributed.all_reduce(torch.ones(1))
    finally:
        distributed.destroy_process_group()
    (place,) = found
    assert place.collective == "all_reduce"
    assert place.line.startswith("launch/test_watchdog.py:")


def test_stacks_name_every_thread(tmp_path):
    dump_stacks(tmp_path / "stacks")
    assert "test_stacks_name_every_thread" in (tmp_path / "stacks").read_text()


def test_one_process_has_no_watchdog():
    threads = threading.active_count()
    with Watchdog(None, 300).watching():
        assert threading.active_count() == threads


def test_half_the_timeout_is_the_limit():
    assert ParallelConfig(timeout=40).watch_seconds == 20
    assert ParallelConfig(watchdog=0).watch_seconds == 0
    for watchdog in (-1, 40, 41):
        with pytest.raises(ValueError, match=r"parallel\.watchdog must be below parallel\.timeout \(40\)"):
            ParallelConfig(timeout=40, watchdog=watchdog)


class Wire:
    """A store of rank 0, and a port that hands on to it: what a cut of the wire does to rank 1."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.store = open_store(self._rank(0, port), 10)
        self.target, self.ends, self.mute = port, [], False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.cluster = self._rank(1, self.listener.getsockname()[1])
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def _rank(self, rank, port):
        place = {"rank": rank, "local_rank": rank, "size": 2, "local_size": 2}
        return Cluster(launcher="torchrun", address="127.0.0.1", port=port, **place)

    def _accept(self, listener):
        while True:
            try:
                near = listener.accept()[0]
            except OSError:
                return
            self.ends.append(near)
            if not self.mute:
                far = socket.create_connection(("127.0.0.1", self.target))
                self.ends.append(far)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._hand_on, args=pair, daemon=True).start()

    def _hand_on(self, source, sink):
        try:
            while data := source.recv(4096):
                sink.sendall(data)
        except OSError:
            return

    def close(self):
        self.listener.close()
        self.cut()

    def cut(self):
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Recorded(Watchdog):
    """Notes that it would end the process."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._patience = 1.2  # longer than an attempt to connect
        self.ends = threading.Event()

    def _end(self, cluster, answers, board):
        self.ends.set()
        self._ended.set()


@pytest.fixture
def wire():
    wire = Wire()
    yield wire
    wire.close()


def answered(wire):
    """Wait until rank 1 has answered anew."""
    wire.store.delete_key("watchdog/answer/1")
    wire.store.wait(["watchdog/answer/1"], timedelta(seconds=10))


def test_a_lost_connection_is_made_again(wire):
    dog = Recorded(wire.cluster, 0.3)
    wire.store.add("watchdog/askers", 1)
    with dog.watching():
        answered(wire)
        wire.cut()
        answered(wire)
        wire.cut()
        answered(wire)
    assert not dog.ends.is_set()


def test_who_cannot_reach_the_store_ends_nothing_alone(wire, capfd):
    dog = Recorded(wire.cluster, 0.3)
    wire.store.add("watchdog/askers", 1)
    with dog.watching():
        answered(wire)
        wire.listener.shutdown(socket.SHUT_RDWR)
        wire.close()
        assert not dog.ends.wait(4)
    assert capfd.readouterr().err.count("the watchdog of rank 1 lost rank 0's store and tries again") == 1


def test_a_store_that_never_answers_is_a_hang(wire):
    wire.mute = True
    dog = Recorded(wire.cluster, 0.3)
    with dog.watching():
        hung = dog.ends.wait(10)
        wire.listener.shutdown(socket.SHUT_RDWR)
        wire.close()  # so that its threads end
    assert hung and len(wire.ends) > 1  # over a second connection too
