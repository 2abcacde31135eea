import gzip
import io
import sqlite3
from pathlib import Path

import pytest

from sigmoe.moe.data.corpora import read_cedict, read_icd10, read_laws

ICD10 = """<?xml version="1.0"?>
<ICD10CM.tabular><chapter><name>1</name><section id="A00-A09">
 <diag><name>A00</name><desc>Cholera</desc>
  <excludes1><note>one &amp; two</note><note>three</note></excludes1>
  <sevenChrDef><extension char="A">initial
      encounter</extension></sevenChrDef>
  <diag><name>A00.0</name><desc>Classical</desc><inclusionTerm><note>Old</note></inclusionTerm>
   <diag><name>A00.01</name><desc>Deep</desc></diag></diag>
  <diag><name>A00.1</name><desc>Later</desc></diag>
 </diag>
 <diag><name>A01</name><desc>Typhoid</desc></diag>
</section></chapter></ICD10CM.tabular>"""


def database(folder: Path, rows: list[tuple[str, str, str | None, str, str]]) -> io.BytesIO:
    path = folder / "source.db"
    connection = sqlite3.connect(path)
    connection.execute(
        "CREATE TABLE articles (id INTEGER PRIMARY KEY, law_id, law_name, chapter, article_no, article_text)"
    )
    connection.executemany(
        "INSERT INTO articles (law_id, law_name, chapter, article_no, article_text) VALUES (?, ?, ?, ?, ?)", rows
    )
    connection.commit()
    connection.close()
    return io.BytesIO(path.read_bytes())


def test_laws_come_by_chapter_in_chunks(tmp_path: Path) -> None:
    rows = [
        ("b", "乙法", None, "第一条", "短。"),
        ("a", "甲法", "第一章 总则", "第一条", "长" * 600),
        ("a", "甲法", "第一章 总则", "第二条", "句" * 600),
        ("a", "甲法", "第二章 其他", "第三条", "末。"),
    ]
    (tmp_path / "scratch").mkdir()
    assert list(read_laws(database(tmp_path, rows), tmp_path / "scratch")) == [
        f"《甲法》\n第一章 总则\n第一条 {'长' * 600}\n",
        f"《甲法》\n第一章 总则\n第二条 {'句' * 600}\n",
        "《甲法》\n第二章 其他\n第三条 末。\n",
        "《乙法》\n第一条 短。\n",
    ]


def test_a_broken_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the database of laws cannot be read"):
        list(read_laws(io.BytesIO(b"no database" * 100), tmp_path))


def test_dictionary_lines_come_in_groups_without_comments() -> None:
    lines = [f"{i} {i} [x] /y/\n" for i in range(120)]
    packed = io.BytesIO(gzip.compress(("# head\n" + "".join(lines)).replace("\n", "\r\n").encode()))
    groups = list(read_cedict(packed))
    assert [group.count("\n") for group in groups] == [50, 50, 20]
    assert "".join(groups) == "".join(lines)


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b"\xff\n" * 60, mtime=0), gzip.compress(b"a\n" * 999, mtime=0)[:-9]]
)
def test_a_broken_dictionary_is_refused(content: bytes) -> None:
    with pytest.raises((ValueError, OSError)):
        list(read_cedict(io.BytesIO(content)))


def test_diagnoses_come_by_category() -> None:
    assert list(read_icd10(io.BytesIO(ICD10.encode()))) == [
        "A00 Cholera\nExcludes1: one & two\nExcludes1: three\n7th character A: initial encounter\n"
        "A00.0 Classical\nIncludes: Old\nA00.01 Deep\nA00.1 Later\n",
        "A01 Typhoid\n",
    ]


def test_long_categories_repeat_their_title() -> None:
    inner = "".join(f"<diag><name>B0.{i}</name><desc>{'d' * 1000}</desc></diag>" for i in range(5))
    xml = f"<x><diag><name>B0</name><desc>Title</desc>{inner}</diag></x>"
    documents = list(read_icd10(io.BytesIO(xml.encode())))
    assert [document.count("\n") for document in documents] == [3, 3, 2]
    assert all(document.startswith("B0 Title\n") for document in documents)


def test_a_broken_list_is_refused() -> None:
    with pytest.raises(ValueError, match="the list of diagnoses cannot be read"):
        list(read_icd10(io.BytesIO(ICD10[:300].encode())))
