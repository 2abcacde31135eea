"""Text that every installation brings: the standard library, files inside installed packages, and docstrings."""

import ast
import hashlib
import inspect
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path, PurePosixPath

from .source import Provenance, Workspace

_FOREIGN = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """The Python sources of the running interpreter's standard library, a file a document.

    Files with a folder of a name in `exclude` on their way are left out.
    """

    exclude: tuple[str, ...] = ()

    def identity(self) -> dict[str, object]:
        """Return the interpreter's version."""
        if not any(self._root().glob("*.py")):
            raise ValueError(f"the standard library has no sources in {self._root()}: use a full Python installation")
        return {"python": platform.python_version()}

    def documents(self, workspace: Workspace) -> Iterator[str]:
        """Yield the files in an order that does not follow the alphabet, so that a capped size is a fair sample."""
        root, left_out = self._root(), {*self.exclude, *_FOREIGN}
        names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
        for name in _shuffled(name for name in names if left_out.isdisjoint(PurePosixPath(name).parts)):
            yield read_source(root / name)

    def provenance(self) -> Provenance:
        """Return the interpreter's name, version and licence."""
        return Provenance(name="Python standard library", version=platform.python_version(), licence="PSF-2.0")

    @staticmethod
    def _root() -> Path:
        return Path(sysconfig.get_path("stdlib"))


@dataclass(frozen=True, kw_only=True)
class PackageFiles:
    """Files of an installed package whose installed names match `files` and none of `exclude`, a file a document.

    The patterns are those of fnmatch: `*` also matches slashes.
    """

    package: str
    files: str
    exclude: tuple[str, ...] = ()

    def identity(self) -> dict[str, object]:
        """Return the package's version; ValueError if it is missing or nothing matches."""
        if not self._names():
            raise ValueError(f"package {self.package}: no installed file matches {self.files!r}")
        return {"version": _distribution(self.package).version}

    def documents(self, workspace: Workspace) -> Iterator[str]:
        """Yield the files in an order that does not follow the alphabet."""
        distribution = _distribution(self.package)
        for name in _shuffled(self._names()):
            yield read_utf8(Path(str(distribution.locate_file(name))))

    def provenance(self) -> Provenance:
        """Return the package's name, version and licence."""
        version = _distribution(self.package).version
        return Provenance(
            name=f"{self.package} ({self.files})",
            version=version,
            licence=licence_of(self.package),
            packages={self.package: version},
        )

    def _names(self) -> list[str]:
        names = [file.as_posix() for file in _distribution(self.package).files or ()]
        matching = (name for name in names if fnmatch(name, self.files) and ".." not in PurePosixPath(name).parts)
        return [name for name in matching if not any(fnmatch(name, pattern) for pattern in self.exclude)]


@dataclass(frozen=True, kw_only=True)
class Docstrings:
    """Docstrings of installed packages, read with `ast` (nothing is imported).

    A document is a module's own docstring, a function's, or a class's together with its methods', each under the
    dotted name. Documents below `min_characters` are left out, and files that match a pattern of `exclude`.
    """

    packages: tuple[str, ...]
    min_characters: int = 80
    exclude: tuple[str, ...] = ()

    def identity(self) -> dict[str, object]:
        """Return the packages' versions; ValueError if one is not installed."""
        return {"packages": self._versions()}

    def documents(self, workspace: Workspace) -> Iterator[str]:
        """Yield the documents of all packages, files in an order that does not follow the alphabet."""
        place: dict[str, Path] = {}
        for package in self.packages:
            distribution = _distribution(package)
            for file in distribution.files or ():
                if file.suffix == ".py" and ".." not in file.parts:
                    place[file.as_posix()] = Path(str(distribution.locate_file(file)))
        for name in _shuffled(place):
            if place[name].is_file() and not any(fnmatch(name, pattern) for pattern in self.exclude):
                for document in docstring_documents(read_source(place[name]), _module_name(name)):
                    if len(document) >= self.min_characters:
                        yield document

    def provenance(self) -> Provenance:
        """Return the list of packages and versions."""
        licences = sorted({licence_of(package) for package in self.packages})
        return Provenance(
            name="docstrings of installed packages", version="", licence="; ".join(licences), packages=self._versions()
        )

    def _versions(self) -> dict[str, str]:
        return {package: _distribution(package).version for package in self.packages}


def docstring_documents(source: str, module: str) -> Iterator[str]:
    """Yield the docstring documents of one module; none if the source does not parse (a template, another Python)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    own = ast.get_docstring(tree)
    if own:
        yield f"{module}\n\n{own}\n"
    for node in tree.body:
        parts = list(_described(node, module))
        if parts:
            yield "\n".join(parts)


def read_source(path: Path) -> str:
    """Return a Python file's text, decoded as the interpreter would."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_utf8(path: Path) -> str:
    """Return a file's text; ValueError with the byte offset where it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def licence_of(package: str) -> str:
    """Return a package's licence as its metadata states it: an SPDX expression, a short name, or its classifiers."""
    fields = _distribution(package).metadata
    for field in ("License-Expression", "License"):
        stated = fields[field].strip() if field in fields else ""
        if stated and "\n" not in stated and len(stated) < 80:
            return stated
    classifiers = [
        entry.split(" :: ")[-1] for entry in fields.get_all("Classifier") or [] if entry.startswith("License")
    ]
    return ", ".join(classifiers) or "not stated"


def _described(node: ast.stmt, prefix: str) -> Iterator[str]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    name = f"{prefix}.{node.name}"
    text = ast.get_docstring(node, clean=False)
    if text:
        signature = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
        yield f"{name}{signature}\n\n{inspect.cleandoc(text)}\n"
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            yield from _described(inner, name)


def _module_name(file: str) -> str:
    parts = PurePosixPath(file).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _distribution(package: str) -> metadata.Distribution:
    try:
        return metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"package {package} is not installed: install it or take it out of the config") from error


def _shuffled(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
