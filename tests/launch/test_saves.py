"""A session's saves: one at a time beside training, nothing that goes wrong is lost, and all of it told."""

import re
import threading

import pytest
import torch

from sigmoe.launch.saves import Saves
from sigmoe.moe.storage.checkpoint import CheckpointContent
from sigmoe.moe.storage.durable import WriteError
from sigmoe.moe.storage.tensors import named_tensors
from sigmoe.parallel.checkpointer import Checkpointer


class HeldCheckpointer(Checkpointer):
    """Begins to write when the test lets it; or fails with an `error` that one process cannot provoke."""

    def __init__(self, directory):
        super().__init__(directory, keep=None)
        self.released, self.error, self.saving, self.written = threading.Event(), None, None, []

    def begin_save(self, step, content):
        assert self.saving is None or self.saving.done(), "two saves at a time"
        self.saving = super().begin_save(step, content)
        return self.saving

    def _write(self, step, content, world):
        assert self.released.wait(60)
        self.written.append(step)
        if self.error is not None:
            raise self.error
        return super()._write(step, content, world)

    def end(self):
        """Let the save under way go on, and wait for it."""
        self.released.set()
        self.saving.exception(60)


@pytest.fixture
def disk(tmp_path):
    held = HeldCheckpointer(tmp_path / "checkpoints")
    yield held
    if held.saving is not None:
        held.end()


@pytest.fixture
def told():
    return []


@pytest.fixture
def saves(disk, told):
    return Saves(disk, told.append, background=True, patience=5.0)


def content():
    tensors = named_tensors({"model.norm.weight": torch.ones(1000)})
    return CheckpointContent(
        model=tensors, optimizer={}, state={}, config={}, registry={}, tokenizer=None, hf_config=None
    )


def test_a_save_that_has_ended_is_known_and_costs_no_wait(saves, disk, told):
    saves.begin(2, content)
    saves.look()
    assert saves.saved_step is None
    disk.end()
    saves.look()
    assert saves.saved_step == 2
    saves.finish(2, content)
    assert (told, disk.written, disk.steps()) == (["saving step 2"], [2], (2,))


def test_the_next_save_waits_and_says_how_long(saves, disk, told):
    saves.begin(2, content)
    timer = threading.Timer(0.3, disk.released.set)
    timer.start()
    saves.begin(4, content)
    timer.join()
    assert [told[0], told[2]] == ["saving step 2", "saving step 4"]
    assert re.fullmatch(r"waited \d+\.\d s for the save of step 2", told[1])
    assert saves.saved_step == 2
    saves.wait()
    assert (saves.saved_step, disk.steps()) == (4, (2, 4))


@pytest.mark.parametrize("settle", ["look", "wait"])
def test_a_full_disk_costs_that_save_alone(saves, disk, told, settle, limit_files):
    saves.begin(2, content)
    limit_files(1000)
    disk.end()
    limit_files(None)
    getattr(saves, settle)()
    assert told[0] == "saving step 2" and len(told) == 2
    assert re.fullmatch(r"step 2 is not saved, training goes on: \S+: writing failed: File too large", told[1])
    assert (saves.saved_step, disk.steps()) == (None, ())
    saves.finish(2, content)
    assert (saves.saved_step, disk.steps()) == (2, (2,))


def replace_folder(disk):
    """Have a file where the checkpoints' folder was: no room would help."""
    disk.directory.rename(disk.directory.with_name("moved"))
    disk.directory.touch()


def refuse(disk):
    disk.error = WriteError("Permission denied")


def have_a_bug(disk):
    disk.error = RuntimeError("a\nbug")


@pytest.mark.parametrize(
    ("spoil", "kind"), [(replace_folder, ValueError), (refuse, WriteError), (have_a_bug, RuntimeError)]
)
def test_any_other_failure_is_told_and_ends_the_run_where_all_ranks_learn_of_it(saves, disk, told, spoil, kind):
    saves.begin(2, content)
    spoil(disk)
    disk.end()
    saves.look()
    saves.look()
    error = disk.saving.exception()
    assert told == ["saving step 2", f"step 2 is not saved: {' '.join(str(error).split())}"]
    with pytest.raises(kind) as raised:
        saves.begin(4, content)
    assert raised.value is error
    saves.wait()  # told once
    assert (disk.written, saves.saved_step) == ([2], None)


def test_an_exception_joins_the_save_and_is_not_hidden_by_its_failure(saves, disk, told):
    disk.error = RuntimeError("gloo: a peer is gone")
    saves.begin(2, content)
    timer = threading.Timer(0.2, disk.released.set)
    timer.start()
    with pytest.raises(KeyboardInterrupt), saves.joined():
        raise KeyboardInterrupt
    assert disk.saving.done()
    assert told == ["saving step 2", "step 2 is not saved: gloo: a peer is gone"]


def test_a_lost_peer_is_told_without_gloos_source(saves, disk, told):
    disk.error = RuntimeError("[/__w/pytorch/third_party/gloo/pair.cc:547] Connection closed by peer [10.0.0.1]:5")
    saves.begin(2, content)
    disk.released.set()
    with pytest.raises(KeyboardInterrupt), saves.joined():
        raise KeyboardInterrupt
    assert told[1] == "step 2 is not saved: Connection closed by peer [10.0.0.1]:5"


def test_a_run_that_ends_badly_gives_up_a_save_that_does_not_end(disk, told):
    saves = Saves(disk, told.append, background=True, patience=0.01)
    saves.begin(2, content)
    with pytest.raises(KeyboardInterrupt), saves.joined():
        raise KeyboardInterrupt
    assert told[1:] == ["step 2 is not saved: it is given up after 0 s"]


def test_without_a_background_a_save_ends_before_training_goes_on(disk, told):
    disk.released.set()
    Saves(disk, told.append, background=False, patience=5.0).begin(2, content)
    assert (disk.saving, disk.steps(), told) == (None, (2,), ["saving step 2"])
