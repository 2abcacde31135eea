"""Documents on their way: deduplicated, split by a hash of their text, cut where they are long, kept in a file.

So sources run once, and what comes out is in an order keyed by the text: any stretch of it is a fair sample. The order
lies in a file too, so that another process can read what this one wrote.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

_LENGTH = struct.Struct("<Q")
_TOLD = ("domain", "seed", "heldout_fraction", "document_bytes", "duplicates", "blank", "smallest")


@dataclass(kw_only=True)
class SplitCount:
    """Documents (pieces, where long ones were cut) and UTF-8 bytes of a split."""

    documents: int = 0
    bytes: int = 0


@dataclass(kw_only=True)
class DomainSpool:
    """The documents of one domain. A text that was there before is a duplicate, one without a visible character blank.

    A document longer than `document_bytes` is cut at line ends; its pieces stay in one split. Holds about 200 bytes a
    document in memory until it is closed, then 8 while it is read, and no text.
    """

    folder: Path
    domain: str
    seed: int
    heldout_fraction: float
    document_bytes: int | None = None
    duplicates: int = 0
    blank: int = 0
    smallest: float = 1.0  # the smallest share that would hold out at least one document
    counts: dict[str, SplitCount] = field(default_factory=lambda: {"train": SplitCount(), "heldout": SplitCount()})
    _seen: set[bytes] = field(default_factory=set)
    _files: dict[str, IO[bytes]] = field(default_factory=dict)
    _places: dict[str, list[tuple[bytes, int]]] = field(default_factory=lambda: {"train": [], "heldout": []})

    @property
    def bytes(self) -> int:
        """UTF-8 bytes kept so far."""
        return sum(count.bytes for count in self.counts.values())

    def add(self, text: str) -> bool:
        """Keep a document unless it is blank or a duplicate; return whether it was kept.

        The split depends on the seed and the text alone, so no text is ever in both splits, nor in the training split
        of one domain and the held-out split of another.
        """
        if not text.strip():
            self.blank += 1
            return False
        data = text.encode("utf-8")
        digest = hashlib.sha256(b"%d\x1f" % self.seed + data).digest()
        if digest[:16] in self._seen:
            self.duplicates += 1
            return False
        self._seen.add(digest[:16])
        share = int.from_bytes(digest[16:24], "little") / 2**64
        self.smallest = min(self.smallest, share)
        split = "heldout" if share < self.heldout_fraction else "train"
        if split not in self._files:
            self._files[split] = self._path(split).open("wb")
        for number, piece in enumerate(cut_document(data, self.document_bytes)):
            key = hashlib.sha256(b"%d\x1f" % number + digest).digest()[:8]
            self._places[split].append((key, self._files[split].tell()))
            self._files[split].write(_LENGTH.pack(len(piece)) + piece)
            self.counts[split].documents += 1
        self.counts[split].bytes += len(data)
        return True

    def close(self) -> None:
        """Finish writing and forget the documents: from now on they are read."""
        for file in self._files.values():
            file.close()
        for split, places in self._places.items():
            np.array([place for _, place in sorted(places)], np.int64).tofile(self._order(split))
            places.clear()
        self._seen.clear()

    def to_json(self) -> dict[str, Any]:
        """Return what another process needs to know of a closed spool, as plain JSON data."""
        counts = {split: asdict(count) for split, count in self.counts.items()}
        return {name: getattr(self, name) for name in _TOLD} | {"folder": str(self.folder), "counts": counts}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the closed spool that `data` tells of; it can be read."""
        counts = {split: SplitCount(**count) for split, count in data["counts"].items()}
        return cls(**dict(data) | {"folder": Path(data["folder"]), "counts": counts})

    def texts(self, split: str, max_bytes: int | None = None) -> Iterator[str]:
        """Yield a split's documents in an order keyed by the text; with `max_bytes` until that much has gone by."""
        done = 0
        with self._path(split).open("rb") as file:
            for place in np.fromfile(self._order(split), np.int64):
                file.seek(int(place))
                data = file.read(_LENGTH.unpack(file.read(_LENGTH.size))[0])
                done += len(data)
                yield data.decode("utf-8")
                if max_bytes is not None and done >= max_bytes:
                    return

    def _path(self, split: str) -> Path:
        return self.folder / f"{self.domain}.{split}"

    def _order(self, split: str) -> Path:
        return self.folder / f"{self.domain}.{split}.order"


def cut_document(data: bytes, limit: int | None) -> Iterator[bytes]:
    """Yield `data` in pieces of at most `limit` bytes, cut after a line end, else between UTF-8 characters."""
    start = 0
    while limit is not None and len(data) - start > limit:
        end = data.rfind(b"\n", start, start + limit) + 1
        if end <= start:
            end = start + limit
            while data[end] & 0xC0 == 0x80:
                end -= 1
        yield data[start:end]
        start = end
    yield data[start:]
