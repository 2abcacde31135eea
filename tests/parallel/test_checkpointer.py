"""The checkpoints of a run: the newest whole one is found, and no failure costs more than the save that failed."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from sigmoe.moe.storage import durable
from sigmoe.moe.storage.checkpoint import MANIFEST, CheckpointContent, checkpoint_bytes, open_checkpoint
from sigmoe.moe.storage.durable import NoRoomError, WriteError
from sigmoe.moe.storage.tensors import NamedTensor, named_tensors
from sigmoe.parallel.checkpointer import Checkpointer

MODEL_FILE = "model/model-00001-of-00001.safetensors"


def content(value, size=6, read=None):
    tensor = torch.full((size,), float(value))
    named = NamedTensor((size,), torch.float32, read or (lambda: tensor))
    return CheckpointContent(
        model={"model.norm.weight": named},
        optimizer={},
        state={"step": value},
        config={},
        registry={},
        tokenizer=None,
        hf_config=None,
    )


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path / "checkpoints", keep=None)


@pytest.fixture
def saved(checkpointer):
    """Steps 2, 4 and 6 stand."""
    for step in (2, 4, 6):
        checkpointer.save(step, content(step))
    return checkpointer


def names(checkpointer):
    return sorted(path.name for path in checkpointer.directory.iterdir())


def latest(checkpointer):
    return (checkpointer.directory / "latest").read_text()


def load(checkpointer):
    """The step that is picked, and what is told on the way."""
    told = []
    checkpoint = checkpointer.load_latest(told.append)
    return checkpoint and checkpoint.state["step"], told


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_save_stands_under_its_step_and_is_the_latest(checkpointer):
    path = checkpointer.save(1000, content(1000))
    assert path == checkpointer.directory / "step-00001000"
    assert latest(checkpointer) == "step-00001000\n"
    assert load(checkpointer) == (1000, [])
    assert names(checkpointer) == ["latest", "step-00001000"]


def test_no_checkpoints_is_a_fresh_start(checkpointer):
    assert load(checkpointer) == (None, [])
    assert not checkpointer.directory.exists()
    checkpointer.directory.mkdir()
    (checkpointer.directory / "notes").mkdir()
    assert load(checkpointer) == (None, [])


def test_steps_ascend_by_number_and_other_names_are_none(saved):
    saved.save(123_456_789, content(1))
    (saved.directory / "step-5").mkdir()
    (saved.directory / "step-00000008").write_bytes(b"a file")
    (saved.directory / "step-00000007").mkdir()
    assert saved.steps() == (2, 4, 6, 123_456_789)
    assert saved.found() == (2, 4, 6, 7, 123_456_789)


@pytest.mark.parametrize(("keep", "left"), [(1, (6,)), (2, (4, 6)), (3, (2, 4, 6)), (5, (2, 4, 6)), (None, (2, 4, 6))])
def test_the_newest_are_kept(tmp_path, keep, left):
    checkpointer = Checkpointer(tmp_path, keep=keep)
    for step in (2, 4, 6):
        checkpointer.save(step, content(step))
    assert checkpointer.steps() == left
    assert len(names(checkpointer)) == len(left) + 1


def test_stops_do_not_count_and_go(tmp_path):
    """What stands after the next regular save does not depend on where the run was stopped."""
    checkpointer = Checkpointer(tmp_path, keep=2, every=4)
    for step, left in ((4, (4,)), (8, (4, 8)), (9, (4, 8, 9)), (10, (4, 8, 10)), (12, (8, 12))):
        checkpointer.save(step, content(step))
        assert checkpointer.steps() == left


def test_a_run_goes_back_to_a_regular_save_alone(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=None, every=4)
    for step in (4, 8, 9, 12):
        checkpointer.save(step, content(step))
    assert checkpointer.load_latest(print, last=11).path == checkpointer.path(8)
    assert checkpointer.load_latest(print).path == checkpointer.path(12)
    for step in (4, 8):
        (checkpointer.path(step) / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint up to step 11 is whole: "):
        checkpointer.load_latest(print, last=11)


def test_what_was_just_saved_is_never_deleted_for_a_newer_one(saved):
    """Steps of an abandoned future may be damaged: they are not counted among those that are kept."""
    checkpointer = Checkpointer(saved.directory, keep=1)
    checkpointer.save(3, content(3))
    assert checkpointer.steps() == (3, 4, 6)
    assert latest(checkpointer) == "step-00000003\n"


def test_old_ones_go_only_after_latest_has_moved(saved, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "sigmoe.parallel.checkpointer.remove_directory", lambda path: seen.append((path.name, latest(saved)))
    )
    Checkpointer(saved.directory, keep=2).save(8, content(8))
    assert seen == [("step-00000002", "step-00000008\n"), ("step-00000004", "step-00000008\n")]


def test_a_checkpoint_that_the_user_moved_away_is_left_alone(saved, tmp_path):
    shutil.move(saved.path(2), tmp_path / "mine")
    saved.path(2).symlink_to(tmp_path / "mine")
    assert saved.steps() == (2, 4, 6)
    Checkpointer(saved.directory, keep=1).save(8, content(8))
    assert saved.steps() == (2, 8)
    open_checkpoint(tmp_path / "mine").verify()


def test_an_old_one_that_cannot_be_deleted_costs_no_save(saved, monkeypatch):
    def refuse(path):
        raise WriteError(f"{path}: writing failed: Permission denied")

    monkeypatch.setattr("sigmoe.parallel.checkpointer.remove_directory", refuse)
    told = []
    Checkpointer(saved.directory, keep=3, note=told.append).save(8, content(8))
    assert load(saved) == (8, [])
    (line,) = told
    assert line.startswith("the checkpoint of step 2 is not deleted: ") and line.endswith("Permission denied")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried 9 bytes")])
def test_memory_that_lacks_for_the_copy_or_beside_training_refuses_that_save_alone(saved, error):
    def fail():
        raise error

    with pytest.raises(NoRoomError, match="not enough memory to save"):
        saved.begin_save(8, content(8, read=fail))
    future = saved.begin_save(8, replace(content(8), state=Spoilt(error)))
    with pytest.raises(NoRoomError, match="not enough memory to save"):
        future.result(timeout=20)
    assert load(saved) == (6, [])


class Spoilt(dict):
    """A state that cannot be written."""

    def __init__(self, error):
        super().__init__(step=8)
        self.error = error

    def items(self):
        raise self.error


def test_the_same_step_is_replaced(saved):
    flip(saved.path(6) / MODEL_FILE)
    saved.save(6, content(66))
    assert load(saved) == (66, [])


@pytest.mark.parametrize("name", [MANIFEST, MODEL_FILE, "state.json", "config.yaml", "registry.json"])
@pytest.mark.parametrize("damage", [flip, os.unlink, lambda path: os.truncate(path, 2)], ids=["flip", "gone", "cut"])
def test_a_damaged_one_is_named_and_the_step_before_is_taken(saved, name, damage):
    damage(saved.path(6) / name)
    step, (told,) = load(saved)
    assert step == 4
    assert "step-00000006" in told
    assert "trying the checkpoint before it" in told
    assert len(told.splitlines()) == 1
    assert name.split("/")[-1] in told


def test_two_damaged_ones_are_both_named(saved):
    flip(saved.path(6) / MODEL_FILE)
    shutil.rmtree(saved.path(4) / "model")
    step, told = load(saved)
    assert step == 2
    assert ["step-00000006" in told[0], "step-00000004" in told[1], len(told)] == [True, True, 2]


def test_if_all_are_damaged_nothing_starts_afresh(saved):
    for step in (2, 4, 6):
        flip(saved.path(step) / MODEL_FILE)
    with pytest.raises(ValueError, match=r"\Ano checkpoint in \S+ is whole: \S+/step-00000006/[^\n]+\Z"):
        load(saved)
    assert saved.steps() == (2, 4, 6)


def test_a_latest_that_lags_or_is_gone_costs_nothing(saved):
    (saved.directory / "latest").write_text("step-00000004\n")
    assert load(saved) == (6, [])
    (saved.directory / "latest").unlink()
    assert load(saved) == (6, [])


@pytest.mark.parametrize("fails", [OSError(errno.EIO, "lost"), KeyboardInterrupt(), ValueError("wrong")], ids=repr)
def test_a_save_that_fails_leaves_everything_as_it_was(saved, fails):
    before = names(saved)

    def read():
        raise fails

    with pytest.raises(type(fails)):
        Checkpointer(saved.directory, keep=1).save(8, content(8, read=read))
    assert names(saved) == before
    assert latest(saved) == "step-00000006\n"
    assert load(saved) == (6, [])


def test_too_little_space_is_one_line_before_anything_is_written(saved, monkeypatch):
    before, wanted = names(saved), content(8)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda path: usage(0, 0, checkpoint_bytes(wanted) - 1))
    with pytest.raises(WriteError, match=r"\A\S+/checkpoints: not enough disk space: [^\n]+\Z"):
        saved.save(8, wanted)
    assert names(saved) == before
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda path: usage(0, 0, checkpoint_bytes(wanted)))
    saved.save(8, wanted)
    assert load(saved) == (8, [])


@pytest.mark.parametrize("limit", [64, 1000, 50_000])
def test_a_disk_that_fills_up_in_the_midst_is_one_line_and_the_old_ones_stand(saved, limit):
    """Beyond RLIMIT_FSIZE writing fails with EFBIG, in the middle of a file, as on a full disk with ENOSPC."""
    before = names(saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(WriteError, match=r"\A\S+step-00000008\S*: writing failed: File too large\Z"):
            Checkpointer(saved.directory, keep=1).save(8, content(8, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(saved) == before
    assert latest(saved) == "step-00000006\n"
    assert load(saved) == (6, [])
    saved.save(8, content(8, size=100_000))
    assert load(saved) == (8, [])


def test_leftovers_of_a_killed_save_are_cleared_by_the_next_start(saved):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    leftover = saved.directory / f".sigmoe-tmp-step-00000008-{process.pid}"
    aside = saved.directory / f".sigmoe-old-step-00000006-{process.pid}"
    shutil.copytree(saved.path(4), leftover)
    saved.path(6).rename(aside)
    assert load(saved) == (6, [])
    assert names(saved) == ["latest", "step-00000002", "step-00000004", "step-00000006"]


def manifest(checkpointer, step):
    return (checkpointer.path(step) / MANIFEST).read_bytes()


@pytest.fixture
def held_back(monkeypatch):
    """Let every save wait, before it writes, until this is set."""
    released = threading.Event()
    write = Checkpointer._write

    def waiting(*arguments):
        assert released.wait(60)
        return write(*arguments)

    monkeypatch.setattr(Checkpointer, "_write", waiting)
    return released


def test_what_is_saved_beside_training_is_the_state_as_it_stood(saved, held_back):
    """Bytes equal those of a save that waits, though the tensors, one of them a strided view, have moved since."""
    memory = torch.arange(24.0).view(4, 6)
    tensors = named_tensors({"model.norm.weight": memory[:, 1:3], "model.embed_tokens.weight": memory})
    whole = replace(content(8), model=tensors, optimizer={"model.norm.weight.step": tensors["model.norm.weight"]})
    saving = saved.begin_save(8, whole)
    begun = memory.clone()
    memory.add_(1)
    assert saved.steps() == (2, 4, 6) and not saving.done()
    held_back.set()
    assert saving.result(60) == saved.path(8)
    assert load(saved) == (8, [])
    memory.copy_(begun)
    other = Checkpointer(saved.directory.with_name("other"), keep=None)
    other.save(8, whole)
    assert manifest(saved, 8) == manifest(other, 8)


def test_a_save_beside_training_that_fails_leaves_everything_as_it_was(saved, monkeypatch):
    before = names(saved)

    def fail(*arguments, **settings):
        raise KeyError("lost")

    monkeypatch.setattr("sigmoe.parallel.checkpointer.write_checkpoint", fail)
    with pytest.raises(KeyError, match="lost"):
        saved.begin_save(8, content(8)).result(60)
    assert names(saved) == before
    monkeypatch.undo()
    assert saved.begin_save(8, content(8)).result(60) == saved.path(8)
    assert load(saved) == (8, [])


def test_too_little_space_is_told_before_anything_is_copied(saved, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda path: usage(0, 0, 0))
    read = []
    with pytest.raises(WriteError, match="not enough disk space"):
        saved.begin_save(8, content(8, read=lambda: read.append(1)))
    assert read == []
