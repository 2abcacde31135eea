"""A session's saves: one at a time beside training, nothing that goes wrong is lost, and all of it told."""

import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from sigmoe.launch.saves import Saves
from sigmoe.moe.storage.durable import NoRoomError, WriteError


class Disk:
    """A checkpointer whose saves end when the test says so."""

    def __init__(self):
        self.begun, self.saved = {}, []

    def begin_save(self, step, content):
        assert all(future.done() for future in self.begun.values()), "two saves at a time"
        self.begun[step] = Future()
        return self.begun[step]

    def save(self, step, content):
        self.saved.append(step)

    def end(self, step, error=None):
        if error is None:
            self.begun[step].set_result(Path("there"))
        else:
            self.begun[step].set_exception(error)


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def told():
    return []


@pytest.fixture
def saves(disk, told):
    return Saves(disk, told.append, background=True, patience=5.0)


def nothing():
    """What is saved does not matter here."""


def test_a_save_that_has_ended_is_known_and_costs_no_wait(saves, disk, told):
    saves.begin(2, nothing)
    saves.look()
    assert saves.saved_step is None
    disk.end(2)
    saves.look()
    assert saves.saved_step == 2
    saves.finish(2, nothing)
    assert (told, disk.saved) == (["saving step 2"], [])


def test_the_next_save_waits_and_says_how_long(saves, disk, told):
    saves.begin(2, nothing)
    timer = threading.Timer(0.3, disk.end, [2])
    timer.start()
    saves.begin(4, nothing)
    timer.join()
    assert [told[0], told[2]] == ["saving step 2", "saving step 4"]
    assert told[1].startswith("waited 0.") and told[1].endswith(" s for the save of step 2")
    assert saves.saved_step == 2
    disk.end(4)
    saves.wait()
    assert saves.saved_step == 4


@pytest.mark.parametrize("settle", ["look", "wait"])
def test_a_full_disk_costs_that_save_alone(saves, disk, told, settle):
    saves.begin(2, nothing)
    disk.end(2, NoRoomError("run: writing failed: No space left on device"))
    getattr(saves, settle)()
    line = "step 2 is not saved, training goes on: run: writing failed: No space left on device"
    assert told == ["saving step 2", line]
    assert saves.saved_step is None
    saves.finish(2, nothing)
    assert disk.saved == [2] and saves.saved_step == 2


@pytest.mark.parametrize("error", [ValueError("a link"), WriteError("Permission denied"), RuntimeError("a\nbug")])
def test_any_other_failure_is_told_and_ends_the_run_where_all_ranks_learn_of_it(saves, disk, told, error):
    saves.begin(2, nothing)
    disk.end(2, error)
    saves.look()
    saves.look()
    assert told == ["saving step 2", f"step 2 is not saved: {' '.join(str(error).split())}"]
    with pytest.raises(type(error), match=str(error)):
        saves.begin(4, nothing)
    saves.wait()  # told once
    assert list(disk.begun) == [2] and saves.saved_step is None


def test_an_exception_joins_the_save_and_is_not_hidden_by_its_failure(saves, disk, told):
    saves.begin(2, nothing)
    timer = threading.Timer(0.2, disk.end, [2, RuntimeError("gloo: a peer is gone")])
    timer.start()
    with pytest.raises(KeyboardInterrupt), saves.joined():
        raise KeyboardInterrupt
    assert disk.begun[2].done()
    assert told == ["saving step 2", "step 2 is not saved: gloo: a peer is gone"]


def test_a_lost_peer_is_told_without_gloos_source(saves, disk, told):
    saves.begin(2, nothing)
    disk.end(2, RuntimeError("[/__w/pytorch/third_party/gloo/pair.cc:547] Connection closed by peer [10.0.0.1]:5"))
    with pytest.raises(KeyboardInterrupt), saves.joined():
        raise KeyboardInterrupt
    assert told[1] == "step 2 is not saved: Connection closed by peer [10.0.0.1]:5"


def test_a_run_that_ends_badly_gives_up_a_save_that_does_not_end(disk, told):
    saves = Saves(disk, told.append, background=True, patience=0.01)
    saves.begin(2, nothing)
    with pytest.raises(KeyboardInterrupt), saves.joined():
        raise KeyboardInterrupt
    assert told[1:] == ["step 2 is not saved: it is given up after 0 s"]


def test_without_a_background_a_save_ends_before_training_goes_on(disk, told):
    saves = Saves(disk, told.append, background=False, patience=5.0)
    saves.begin(2, nothing)
    assert (disk.saved, disk.begun, saves.saved_step) == ([2], {}, 2)
