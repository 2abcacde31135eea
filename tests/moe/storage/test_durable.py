"""What appears under its name is complete; what is refused leaves the disk as it was."""

import errno
import hashlib
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from sigmoe.moe.storage.durable import (
    WriteError,
    durable_directory,
    make_directory,
    remove_directory,
    remove_stale,
    require_space,
    restore_replaced,
    write_file,
)
from sigmoe.moe.storage.hashing import PIECE_BYTES, hash_file


@contextmanager
def files_of_at_most(num_bytes):
    """Writing beyond it fails with EFBIG, as a full disk does with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_stands_under_the_name_before_the_end(tmp_path):
    with durable_directory(tmp_path / "new") as directory:
        directory.write("a/b/c", b"text")
        assert not (tmp_path / "new").exists()
    assert names(tmp_path) == ["new"]
    assert (tmp_path / "new/a/b/c").read_bytes() == b"text"


@pytest.mark.parametrize("size", [0, 1, 1 << 20, PIECE_BYTES, 2 * PIECE_BYTES + 5])
def test_the_record_is_size_and_hash_of_what_lies_on_the_disk(tmp_path, size):
    data = os.urandom(size)
    with durable_directory(tmp_path / "new") as directory:
        whole = directory.write("whole", data)
        pieces = directory.write("pieces", (data[i : i + 300_001] for i in range(0, size, 300_001)))
        with directory.open("stream") as writer:
            for half in (data[: size // 3], memoryview(bytearray(data[size // 3 :]))):
                writer.write(half)
            assert writer.size == size
    assert whole == pieces == directory.records["stream"] == (size, hashlib.sha256(data).hexdigest())
    for name in ("whole", "pieces", "stream"):
        assert (tmp_path / "new" / name).read_bytes() == data
        assert hash_file(tmp_path / "new" / name) == whole


def test_wide_memoryviews_are_written_by_their_bytes(tmp_path):
    with durable_directory(tmp_path / "new") as directory:
        record = directory.write("ints", memoryview(bytes(range(16))).cast("i"))
    assert record.size == 16
    assert (tmp_path / "new/ints").read_bytes() == bytes(range(16))


def test_files_then_folders_then_the_parent_are_synced(tmp_path, monkeypatch):
    events = []

    def fsync(descriptor, real=os.fsync):
        events.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", lambda a, b, real=os.rename: (events.append("rename"), real(a, b)))
    with durable_directory(tmp_path / "new") as directory:
        directory.write("folder/file", b"text")
    root = str(directory.root)
    assert events == [f"{root}/folder/file", f"{root}/folder", root, "rename", str(tmp_path)]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../x", "/x", "a//b", "a/", "./a", "a\0b", "a/.."])
def test_names_that_leave_the_directory_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="relative file name"), durable_directory(tmp_path / "new") as directory:
        directory.write(name, b"")
    assert names(tmp_path) == []


def test_links_are_refused_and_what_they_point_at_is_untouched(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(ValueError, match="is a link"), durable_directory(tmp_path / "link", replace=True):
        pass
    with pytest.raises(ValueError, match="is no folder"), durable_directory(tmp_path / "new") as directory:
        (directory.root / "inside").symlink_to(tmp_path / "target")
        directory.write("inside/file", b"")
    with pytest.raises(ValueError, match="exists already"), durable_directory(tmp_path / "new") as directory:
        (directory.root / "file").symlink_to(tmp_path / "target/file")
        directory.write("file", b"")
    with pytest.raises(ValueError, match="is a link"):
        write_file(tmp_path / "link", b"")
    with pytest.raises(ValueError, match="is a link"):
        remove_directory(tmp_path / "link")
    with pytest.raises(OSError, match="symbolic links"):
        hash_file(tmp_path / "link")
    assert names(tmp_path) == ["link", "target"]
    assert names(tmp_path / "target") == []


def test_a_file_is_written_once(tmp_path):
    with pytest.raises(ValueError, match="written already"), durable_directory(tmp_path / "new") as directory:
        directory.write("file", b"1")
        directory.write("file", b"2")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_or_the_old_state(tmp_path, error):
    for _ in range(2):
        before = names(tmp_path)
        with pytest.raises(error), durable_directory(tmp_path / "new", replace=True) as directory:
            directory.write("file", b"half")
            raise error
        assert names(tmp_path) == before
        if not before:
            with durable_directory(tmp_path / "new") as directory:
                directory.write("file", b"whole")
    assert (tmp_path / "new/file").read_bytes() == b"whole"


def test_an_exception_in_a_stream_leaves_no_record(tmp_path):
    with durable_directory(tmp_path / "new") as directory:
        with pytest.raises(RuntimeError), directory.open("file") as writer:
            writer.write(b"half")
            raise RuntimeError
        assert directory.records == {}


def test_what_exists_is_replaced_on_request_only(tmp_path):
    with durable_directory(tmp_path / "new") as directory:
        directory.write("old", b"old")
    with pytest.raises(ValueError, match="exists already"), durable_directory(tmp_path / "new"):
        pass
    with durable_directory(tmp_path / "new", replace=True) as directory:
        directory.write("fresh", b"fresh")
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["fresh"]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file"), durable_directory(tmp_path / "file", replace=True):
        pass


def test_a_failed_rename_brings_the_old_directory_back(tmp_path, monkeypatch):
    with durable_directory(tmp_path / "new") as directory:
        directory.write("file", b"old")

    def rename(source, target, real=os.rename):
        if str(source) == str(fresh.root):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(WriteError), durable_directory(tmp_path / "new", replace=True) as fresh:
        fresh.write("file", b"fresh")
    assert names(tmp_path) == ["new"]
    assert (tmp_path / "new/file").read_bytes() == b"old"


def test_a_full_disk_is_one_line_and_the_old_state_stands(tmp_path):
    with durable_directory(tmp_path / "new") as directory:
        directory.write("file", b"old")
    write_file(tmp_path / "single", b"old")
    with files_of_at_most(100_000):
        with pytest.raises(WriteError) as big, durable_directory(tmp_path / "new", replace=True) as directory:
            directory.write("file", bytes(200_000))
        with pytest.raises(WriteError) as single:
            write_file(tmp_path / "single", bytes(200_000))
    for caught in (big, single):
        assert "\n" not in str(caught.value)
        assert os.strerror(errno.EFBIG) in str(caught.value)
    assert "file" in str(big.value)
    assert names(tmp_path) == ["new", "single"]
    assert (tmp_path / "new/file").read_bytes() == (tmp_path / "single").read_bytes() == b"old"


def test_space_is_asked_of_the_nearest_folder_that_exists(tmp_path):
    require_space(tmp_path / "not/yet/there", 1)
    with pytest.raises(
        WriteError, match=r"^\S*/not/yet/there: not enough disk space: 1000000\.000 GB needed, .* GB free"
    ):
        require_space(tmp_path / "not/yet/there", 10**15)
    assert names(tmp_path) == []


def test_folders_are_made_with_their_parents(tmp_path):
    make_directory(tmp_path / "a/b/c")
    make_directory(tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="is no directory"):
        make_directory(tmp_path / "file/b")


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path, dead_pid):
    (tmp_path / f".sigmoe-tmp-new-{dead_pid}").mkdir()
    (tmp_path / f".sigmoe-tmp-new-{dead_pid}/file").write_bytes(b"half")
    (tmp_path / f".sigmoe-tmp-latest-{dead_pid}").write_bytes(b"half")
    (tmp_path / f".sigmoe-tmp-link-{dead_pid}").symlink_to(tmp_path / "theirs")
    stay = [f".sigmoe-tmp-new-{os.getppid()}", f".sigmoe-tmp-other-{os.getpid()}", f".tmp-new-{dead_pid}", "theirs"]
    for name in stay:
        (tmp_path / name).mkdir()
    remove_stale(tmp_path)
    assert names(tmp_path) == sorted(stay)


def test_leftovers_of_an_earlier_process_of_the_same_pid_go(tmp_path, monkeypatch):
    leftover = tmp_path / f".sigmoe-tmp-new-{os.getpid()}"
    leftover.mkdir()
    monkeypatch.setattr("sigmoe.moe.storage.durable._STARTED", leftover.stat().st_ctime + 1)
    remove_stale(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("taken", [False, True])
def test_a_replacement_cut_in_two_is_finished(tmp_path, dead_pid, taken):
    """Killed between the two renames the old directory comes back; after them it goes."""
    old = tmp_path / f".sigmoe-old-new-{dead_pid}"
    old.mkdir()
    (old / "file").write_bytes(b"old")
    if taken:
        (tmp_path / "new").mkdir()
        (tmp_path / "new/file").write_bytes(b"fresh")
    restore_replaced(tmp_path)
    assert names(tmp_path) == ["new"]
    assert (tmp_path / "new/file").read_bytes() == (b"fresh" if taken else b"old")
