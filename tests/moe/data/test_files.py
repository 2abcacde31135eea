import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sigmoe.moe.data.files import Files
from sigmoe.moe.data.source import Workspace

TEXTS = ["one\r\ntwo", "第三\u2028 four", "\ufeff<|endoftext|>"]


def read(pattern: Path | str, **keys: str) -> list[str]:
    source = Files(files=str(pattern), **keys)
    source.identity()
    return list(source.documents(Workspace(cache=Path("unused"))))


def test_every_kind_gives_the_texts_exactly(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    rows = "\n\n".join(json.dumps({"id": 1, "text": text}) for text in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(rows)
    (tmp_path / "b.JSONL.GZ").write_bytes(gzip.compress(rows, mtime=0))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "id": [1, 2, 3]}), tmp_path / "c.parquet")
    for pattern in ("*.txt", "a.jsonl", "b.*", "c.parquet"):
        assert read(tmp_path / pattern) == TEXTS
    assert read(tmp_path / "**" / "*.txt") == TEXTS


def test_the_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    assert read(tmp_path / "a.jsonl", text_field="body") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", r"a\.txt: not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl: not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 1', r"a\.jsonl, line 3: not a JSON object"),
        ("a.jsonl", b"[1]", r"a\.jsonl, line 1: not a JSON object but list"),
        ("a.jsonl", b'{"b": 1, "a": 2}', r"a\.jsonl, line 1: no field 'text' \(fields: a, b\); set data.text_field"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl, line 1: field 'text' is not text but NoneType"),
        ("a.jsonl", b'{"text": "a\\ud800"}', r"a\.jsonl, line 1: half of a surrogate pair at character 1"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not a JSON object"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: unreadable after line 0"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], r"a\.jsonl\.gz: unreadable after line"),
        ("a.parquet", b"no parquet", r"a\.parquet cannot be read as Parquet after row 0"),
        ("a.csv", b"x", r"a\.csv: unknown kind of file; readable are \.txt"),
    ],
)
def test_bad_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"]}, r"no column 'text' \(columns: body\)"),
        ({"text": [1]}, "column 'text' is not text but int64"),
        ({"text": ["x", None]}, r"row 2: column 'text' is empty"),
    ],
)
def test_bad_parquet_is_named(columns: dict[str, list[object]], message: str, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.parquet")


def test_parquet_with_bad_utf8_is_named(tmp_path: Path) -> None:
    array = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, array.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: not UTF-8 at byte 0"):
        read(tmp_path / "a.parquet")


def test_nothing_to_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for pattern in (tmp_path / "*.txt", tmp_path / "none.jsonl"):
        with pytest.raises(ValueError, match="no file matches"):
            read(pattern)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"dangling\.txt cannot be read: No such file"):
        read(tmp_path / "*.txt")


def test_identity_changes_with_a_file(tmp_path: Path) -> None:
    source = Files(files=str(tmp_path / "*.txt"))
    (tmp_path / "a.txt").write_text("one")
    before = source.identity()
    assert source.identity() == before
    (tmp_path / "a.txt").write_text("three")
    assert source.identity() != before
