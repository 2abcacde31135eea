"""A directory that is finished by a later writer: what was whole stays, all else goes, and no half one is named."""

import pytest

from sigmoe.moe.storage.durable import WriteError
from sigmoe.moe.storage.resumable import ResumableDirectory, clear_part, resumable_directory

KEY = {"of": "this", "kept": [[0, 1], [2]]}


class Killed(BaseException):
    """As little is done after it as after a kill, but that the lock is released."""


def write_file(directory, name, data, parts):
    with directory.open(name) as writer:
        writer.write(data)
        writer.parts = parts


def write_some(path, key=KEY, names=("a.bin", "sub/b.bin")):
    """Write the files and one without parts, begin another, and be killed."""
    with pytest.raises(Killed), resumable_directory(path, key) as directory:
        for name in names:
            write_file(directory, name, name.encode() * 9, {"x": name})
        directory.write("small.json", b"{}")
        (directory.root / "half.bin").write_bytes(b"hal")
        raise Killed
    assert not path.exists()
    return path.parent / f".sigmoe-part-{path.name}"


def files_of(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_it_goes_on_and_appears_whole(tmp_path):
    path = tmp_path / "out"
    part = write_some(path)
    before = (part / "files/sub/b.bin").stat()
    with resumable_directory(path, KEY) as directory:
        assert directory.finished == {"a.bin", "sub/b.bin"}
        assert directory.parts == {"a.bin": {"x": "a.bin"}, "sub/b.bin": {"x": "sub/b.bin"}}
        assert directory.finished_bytes == 9 * len("a.bin" + "sub/b.bin")
        assert not (part / "files/half.bin").exists() and not (part / "files/small.json").exists()
        with pytest.raises(ValueError, match="written already"):
            directory.write("a.bin", b"")
        directory.write("small.json", b"{}")
    assert files_of(path) == {"a.bin": b"a.bin" * 9, "sub/b.bin": b"sub/b.bin" * 9, "small.json": b"{}"}
    assert (path / "sub/b.bin").stat().st_ino == before.st_ino
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_other_settings_begin_anew(tmp_path):
    part, told = write_some(tmp_path / "out"), []
    with resumable_directory(tmp_path / "out", KEY | {"of": "that"}, told.append) as directory:
        assert directory.finished == frozenset() and directory.records == {}
        assert files_of(part / "files") == {}
    assert told == [part]


@pytest.mark.parametrize("line", [b'{"file": "c.bin", "rec', b""])
def test_a_torn_line_counts_for_nothing(tmp_path, line):
    part = write_some(tmp_path / "out")
    with (part / "0.jsonl").open("ab") as journal:
        journal.write(line)
    write_some(tmp_path / "out", names=("c.bin",))
    with resumable_directory(tmp_path / "out", KEY) as directory:
        assert directory.finished == {"a.bin", "sub/b.bin", "c.bin"}


def test_a_file_that_changed_its_size_is_written_again(tmp_path):
    part = write_some(tmp_path / "out")
    (part / "files/a.bin").write_bytes(b"short")
    with resumable_directory(tmp_path / "out", KEY) as directory:
        assert directory.finished == {"sub/b.bin"}
        directory.write("a.bin", b"anew")


def test_several_processes_note_what_they_finish(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(Killed), resumable_directory(path, KEY) as directory:
        other = ResumableDirectory(directory.root, rank=1)
        write_file(directory, "a.bin", b"a", {"x": "1"})
        write_file(other, "b.bin", b"b", {"y": "2"})
        directory.adopt(other.notes())
        assert directory.records["b.bin"] == other.records["b.bin"]
        raise Killed
    with resumable_directory(path, KEY) as directory:
        assert directory.finished == {"a.bin", "b.bin"}


def test_what_proved_useless_goes_and_a_full_disk_does_not_matter(tmp_path):
    part = write_some(tmp_path / "out")
    with pytest.raises(WriteError), resumable_directory(tmp_path / "out", KEY):
        raise WriteError("full")
    assert part.exists()
    with pytest.raises(ValueError, match="wrong"), resumable_directory(tmp_path / "out", KEY):
        raise ValueError("wrong")
    assert not any(tmp_path.iterdir())


def test_two_writers_do_not_meet(tmp_path):
    with resumable_directory(tmp_path / "out", KEY), pytest.raises(ValueError, match="another process is writing"):
        resumable_directory(tmp_path / "out", KEY).__enter__()
    with pytest.raises(ValueError, match="exists already"), resumable_directory(tmp_path / "out", KEY):
        pass


def test_what_nobody_will_finish_is_cleared(tmp_path):
    part = write_some(tmp_path / "out")
    clear_part(tmp_path / "out")
    assert not part.exists() and not any(tmp_path.iterdir())
    clear_part(tmp_path / "out")


@pytest.mark.parametrize("line", [b"", b"\0" * 9, b"{}", b"[1]", b'{"file": "c", "record": [1], "parts": {}}', b'"\r"'])
def test_a_damaged_journal_is_told_apart_from_a_torn_one(tmp_path, line):
    part = write_some(tmp_path / "out")
    journal = part / "0.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + line + b"\n")
    with pytest.raises(ValueError, match=r"0\.jsonl, line 3 is damaged: remove .*\.sigmoe-part-out and begin anew"):
        resumable_directory(tmp_path / "out", KEY).__enter__()
    journal.write_bytes(whole)
    with resumable_directory(tmp_path / "out", KEY) as directory:
        assert directory.finished == {"a.bin", "sub/b.bin"}
