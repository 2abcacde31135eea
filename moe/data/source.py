"""What a source of documents is. Sources are their own frozen configs; each kind lives in a file of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from .progress import Progress, no_progress


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where text came from: recorded in dataset.json.

    `sha256` is that of the artifact that was read; None where there is no single one, and then the hash of the texts
    is recorded. `packages` maps names to versions where the text came out of installed packages.
    """

    name: str
    version: str
    licence: str
    sha256: str | None = None
    packages: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """What sources may use: a folder to keep downloads in, further options for pip, and somebody who watches."""

    cache: Path
    pip_options: tuple[str, ...] = ()
    progress: Progress = no_progress


class Source(Protocol):
    """Documents of one domain: a dataclass whose fields are its settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def identity(self) -> dict[str, object]:
        """Return plain data that changes when the text may have changed; cheap.

        Raises ValueError if the source cannot be read as configured (nothing matches, a package is missing).
        """

    def documents(self, workspace: Workspace) -> Iterator[str]:
        """Yield the texts, one document at a time. Raises ValueError with file and place where one is unreadable."""

    def provenance(self) -> Provenance:
        """Return what to record."""
