import platform
import sysconfig
from itertools import islice
from pathlib import Path

import pytest

from sigmoe.moe.data.installed import (
    Docstrings,
    PackageFiles,
    StandardLibrary,
    docstring_documents,
    licence_of,
    read_source,
    read_utf8,
)
from sigmoe.moe.data.source import Workspace

WORKSPACE = Workspace(cache=Path("unused"))

SOURCE = '''"""Module text."""
import os


def outer(a, *, b: int = 3) -> str:
    """First line.

        Indented.
    Back.
    """
    def inner():
        """Not public."""


class Thing(Base):
    """A thing."""

    def method(self, x):
        """Do it."""

    async def later(self):
        """Do it later."""

    def silent(self): ...


class Empty:
    pass
'''


def test_docstrings_of_a_module() -> None:
    assert list(docstring_documents(SOURCE, "pkg.mod")) == [
        "pkg.mod\n\nModule text.\n",
        "pkg.mod.outer(a, *, b: int=3)\n\nFirst line.\n\n    Indented.\nBack.\n",
        "pkg.mod.Thing\n\nA thing.\n\npkg.mod.Thing.method(self, x)\n\nDo it.\n\n"
        "pkg.mod.Thing.later(self)\n\nDo it later.\n",
    ]


@pytest.mark.parametrize("source", ["def f(:", "print 'old'", "x = '\0'", "{{ template }} %"])
def test_what_does_not_parse_has_no_docstrings(source: str) -> None:
    assert list(docstring_documents(source, "m")) == []


def test_docstrings_of_installed_packages() -> None:
    source = Docstrings(packages=("pytest", "hydra-core"), min_characters=100, exclude=("*/plugins/*",))
    documents = list(source.documents(WORKSPACE))
    assert len(documents) > 100
    assert all(len(document) >= 100 for document in documents)
    assert {document.partition(".")[0] for document in documents} >= {"_pytest", "hydra"}
    packages = source.provenance().packages
    assert packages is not None
    assert set(packages) == {"pytest", "hydra-core"}
    assert packages["pytest"] == pytest.__version__
    assert documents == list(source.documents(WORKSPACE))


def test_the_standard_library_without_site_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("a.py", "site-packages/b.py", "dist-packages/c.py", "pkg/d.py", "pkg/test/e.py", "pkg/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path) if name == "stdlib" else None)
    source = StandardLibrary(exclude=("test",))
    assert sorted(source.documents(WORKSPACE)) == ["# a.py\n", "# pkg/d.py\n"]
    (tmp_path / "a.py").unlink()
    with pytest.raises(ValueError, match="use a full Python installation"):
        source.identity()


def test_the_real_standard_library() -> None:
    source = StandardLibrary(exclude=("test",))
    assert source.identity() == {"python": platform.python_version()}
    assert len(list(islice(source.documents(WORKSPACE), 20))) == 20


def test_files_of_an_installed_package() -> None:
    source = PackageFiles(package="torch", files="torch/include/c10/*.h", exclude=("*/cuda/*", "*/util/*"))
    assert set(source.identity()) == {"version"}
    documents = list(islice(source.documents(WORKSPACE), 30))
    assert len(documents) == 30
    assert all("#" in document for document in documents)
    with pytest.raises(ValueError, match=r"no installed file matches '\*\.none'"):
        PackageFiles(package="torch", files="*.none").identity()


@pytest.mark.parametrize(
    "source", [Docstrings(packages=("no-such-thing",)), PackageFiles(package="no-such-thing", files="*")]
)
def test_a_missing_package_is_named(source: Docstrings | PackageFiles) -> None:
    with pytest.raises(ValueError, match="package no-such-thing is not installed"):
        source.identity()


def test_licences_are_short() -> None:
    assert licence_of("hypothesis") == "MPL-2.0"
    assert all("\n" not in licence_of(package) and licence_of(package) for package in ("torch", "numpy", "pip"))


def test_source_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes("# -*- coding: latin-1 -*-\n# café\n".encode("latin-1"))
    assert read_source(path).endswith("# café\n")
    with pytest.raises(ValueError, match=r"a\.py: not UTF-8 at byte 31"):
        read_utf8(path)
    path.write_bytes(b"# \xff\n")
    with pytest.raises(ValueError, match=r"a\.py cannot be read"):
        read_source(path)
    with pytest.raises(ValueError, match=r"gone\.py cannot be read"):
        read_source(tmp_path / "gone.py")
