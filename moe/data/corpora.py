"""Readers that turn the data files of three public packages into documents of a few kilobytes.

All of them stream: a document at a time is in memory. Malformed files raise ValueError.
"""

import gzip
import shutil
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

_DOCUMENT_BYTES = 3000
_LINES = 50
_NOTES = {
    "inclusionTerm": "Includes",
    "includes": "Includes",
    "excludes1": "Excludes1",
    "excludes2": "Excludes2",
    "codeFirst": "Code first",
    "useAdditionalCode": "Use additional code",
    "codeAlso": "Code also",
    "notes": "Note",
}


def read_laws(member: IO[bytes], scratch: Path) -> Iterator[str]:
    """Yield chunks of one chapter of one law each, under the law's name and the chapter's.

    The member is an SQLite file with a table `articles` (law_id, law_name, chapter, article_no, article_text). SQLite
    wants a file, so the member is copied into the folder `scratch`; laws come in the order of their ids, which are
    hashes.
    """
    copy = scratch / "laws.db"
    with copy.open("wb") as file:
        shutil.copyfileobj(member, file)
    connection = sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    query = "SELECT law_id, law_name, chapter, article_no, article_text FROM articles ORDER BY law_id, id"
    try:
        for (_, law, chapter), rows in groupby(connection.execute(query), key=lambda row: row[:3]):
            title = f"《{law}》\n" + (f"{chapter}\n" if chapter else "")
            yield from _chunks(title, (f"{number} {text}\n" for *_, number, text in rows))
    except sqlite3.Error as error:
        raise ValueError(f"the database of laws cannot be read: {error}") from error
    finally:
        connection.close()


def read_cedict(member: IO[bytes]) -> Iterator[str]:
    """Yield groups of 50 entries of CC-CEDICT (gzip; lines `traditional simplified [pinyin] /meaning/`)."""
    group: list[str] = []
    try:
        with gzip.open(member, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                if not line.startswith("#") and line.strip():
                    group.append(line.rstrip("\r\n") + "\n")
                if len(group) == _LINES:
                    yield "".join(group)
                    group = []
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"the dictionary cannot be read: {error}") from error
    if group:
        yield "".join(group)


def read_icd10(member: IO[bytes]) -> Iterator[str]:
    """Yield the entries of one three-character category of ICD-10-CM each (long ones in several documents)."""
    depth = 0
    try:
        for event, element in ElementTree.iterparse(member, events=("start", "end")):
            if element.tag != "diag":
                continue
            depth += 1 if event == "start" else -1
            if event == "end" and depth == 0:
                title = f"{element.findtext('name', '')} {element.findtext('desc', '')}\n"
                entries = _entries(element)
                yield from _chunks(title, chain([next(entries).removeprefix(title)], entries))
                element.clear()
    except ElementTree.ParseError as error:
        raise ValueError(f"the list of diagnoses cannot be read: {error}") from error


def _entries(diagnosis: ElementTree.Element) -> Iterator[str]:
    """Yield the text of a diagnosis and of all below it, an entry each."""
    lines = [f"{diagnosis.findtext('name', '')} {diagnosis.findtext('desc', '')}"]
    for child in diagnosis:
        if child.tag in _NOTES:
            lines += [f"{_NOTES[child.tag]}: {_flat(note)}" for note in child.iter("note")]
        elif child.tag == "sevenChrDef":
            lines += [f"7th character {entry.get('char', '')}: {_flat(entry)}" for entry in child.iter("extension")]
    yield "\n".join(lines) + "\n"
    for child in diagnosis.findall("diag"):
        yield from _entries(child)


def _flat(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def _chunks(title: str, parts: Iterable[str]) -> Iterator[str]:
    """Yield `title` followed by as many parts as fit; further documents repeat the title."""
    text = title
    for part in parts:
        if text != title and len((text + part).encode()) > _DOCUMENT_BYTES:
            yield text
            text = title
        text += part
    yield text
