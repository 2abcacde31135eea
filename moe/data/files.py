"""The user's own text: .txt (a file a document), .jsonl, .jsonl.gz and .parquet (a row a document)."""

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from .installed import read_utf8
from .source import Provenance, Workspace

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files that match the pattern `files` (`**` descends into folders); rows have their text in field `text_field`."""

    files: str
    text_field: str = "text"
    licence: str = "not stated"

    def identity(self) -> dict[str, object]:
        """Return name, size and time of change of each file.

        Raises ValueError if nothing matches, a file cannot be read or has an unknown suffix.
        """
        rows = []
        for path in self.paths():
            if not path.name.lower().endswith(SUFFIXES):
                raise ValueError(f"{path}: unknown kind of file; readable are {', '.join(SUFFIXES)}")
            try:
                with path.open("rb"):
                    status = path.stat()
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror}") from error
            rows.append([str(path), status.st_size, status.st_mtime_ns])
        return {"files": rows}

    def paths(self) -> list[Path]:
        """Return the matching files, sorted; ValueError if there are none."""
        pattern = str(Path(self.files).expanduser())
        paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 - may be absolute
        paths = [path for path in paths if not path.is_dir()]
        if not paths and Path(pattern).is_dir():
            raise ValueError(f"{self.files} is a folder: name its files, as in {self.files.rstrip('/')}/*.txt")
        if not paths:
            raise ValueError(f"no file matches {self.files!r} (from {Path.cwd()}): correct the path or the pattern")
        return paths

    def documents(self, workspace: Workspace) -> Iterator[str]:
        """Yield the texts in the order of the files' names."""
        for path in self.paths():
            name = path.name.lower()
            if name.endswith(".txt"):
                yield read_utf8(path)
            elif name.endswith(".parquet"):
                yield from _parquet(path, self.text_field)
            elif name.endswith(".gz"):
                with gzip.open(path, "rb") as packed:
                    yield from _lines(path, packed, self.text_field)
            else:
                with path.open("rb") as plain:
                    yield from _lines(path, plain, self.text_field)

    def provenance(self) -> Provenance:
        """Return the pattern; a user's files have no version."""
        return Provenance(name=self.files, version="", licence=self.licence)


def _lines(path: Path, file: Iterable[bytes], field: str) -> Iterator[str]:
    lines, number, offset = iter(file), 0, 0
    while True:
        try:
            line = next(lines, None)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: unreadable after line {number} ({error})") from error
        if line is None:
            return
        number += 1
        if line.strip():
            row, place = parse_row(line, path, number, offset), f"{path}, line {number}"
            if field not in row:
                known = ", ".join(sorted(map(str, row))) or "none"
                raise ValueError(f"{place}: no field {field!r} (fields: {known}); set data.text_field")
            yield text_of(row, field, place)
        offset += len(line)


def parse_row(line: bytes, path: Path, number: int, offset: int) -> dict[str, Any]:
    """Parse line `number` of `path`, which begins at byte `offset`; ValueError with the place where it is no object."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {offset + error.start}; convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: not a JSON object but {type(row).__name__}")
    return row


def text_of(row: Mapping[str, Any], field: str, place: str) -> str:
    """Return the text in `field` of a row; ValueError that begins with `place` where it is none."""
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: field {field!r} is not text but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: half of a surrogate pair at character {error.start}, which is no text") from error
    return text


def _parquet(path: Path, field: str) -> Iterator[str]:
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                known = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{path}: no column {field!r} (columns: {known}); set data.text_field")
            kind = file.schema_arrow.field(field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise ValueError(f"{path}: column {field!r} is not text but {kind}")
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    if text is None:
                        raise ValueError(f"{path}, row {row}: column {field!r} is empty (null)")
                    yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, row {row}: not UTF-8 at byte {error.start} of the text") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as Parquet after row {row}: {error}") from error
