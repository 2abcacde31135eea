"""What the watchdog says, and what it takes for a move."""

import threading
import time

import pytest
import torch
from torch import distributed

from sigmoe.launch.notice_board import Answer
from sigmoe.launch.stacks import dump_stacks, find_place, motion
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


def test_a_thread_that_saves_moves_the_rank():
    before, go = motion(), threading.Event()
    saving = threading.Thread(target=go.wait, name="save_0")
    saving.start()
    while motion() == before:
        time.sleep(0.01)
    go.set()
    saving.join()


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
