"""A prepared dataset: token files per domain and split, the tokenizer, and dataset.json that says what they are."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..storage.hashing import hash_file
from .indexed import IndexedDocuments
from .progress import Progress, no_progress

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
TOKENIZER = "tokenizer.json"
TOKEN_COUNTS = "token_counts.safetensors"
SPLITS = ("train", "heldout")


@dataclass(frozen=True, kw_only=True)
class DomainData:
    """One domain: its name and id, and the documents of its two splits."""

    name: str
    id: int
    train: IndexedDocuments
    heldout: IndexedDocuments


class Dataset:
    """An open dataset directory. `manifest` is the content of dataset.json; make it with `open_dataset`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.vocab_size: int = manifest["vocab_size"]
        self.end_of_text: int = manifest["end_of_text"]
        self.padding: int = manifest["padding"]
        self._domains = {
            entry["name"]: DomainData(
                name=entry["name"],
                id=entry["id"],
                **{split: IndexedDocuments(path / f"{entry['name']}.{split}.bin") for split in SPLITS},
            )
            for entry in manifest["domains"]
        }

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names of the domains in the order of their ids."""
        return tuple(self._domains)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file, in the format of the `tokenizers` library."""
        return self.path / TOKENIZER

    def domain(self, name: str) -> DomainData:
        """Return a domain; ValueError that lists the known ones."""
        if name not in self._domains:
            raise ValueError(f"unknown domain {name!r}; known domains: {', '.join(self._domains)}")
        return self._domains[name]

    def bytes(self, domain: str, split: str) -> int:
        """Return the UTF-8 bytes of a split's text."""
        return int(self._entry(domain)["splits"][split]["bytes"])

    def token_counts(self, domain: str) -> Tensor:
        """Return how often each id occurs in the domain's training split, int64 `[V]`."""
        path = self.path / TOKEN_COUNTS
        self.domain(domain)
        try:
            with safe_open(path, framework="pt") as file:
                count_V: Tensor = file.get_tensor(domain)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): prepare the dataset again") from error
        if count_V.shape != (self.vocab_size,) or count_V.dtype != torch.int64:
            found = f"{count_V.dtype} {list(count_V.shape)}"
            raise ValueError(f"{path}: {domain!r} must be int64 [{self.vocab_size}], it is {found}")
        return count_V

    def token_bytes(self) -> NDArray[np.int64]:
        """Return the number of UTF-8 bytes that each id stands for, int64 `[V]`; 0 for the special ids.

        In a byte-level vocabulary every character of an entry stands for one byte.
        """
        model = _read_json(self.tokenizer_path)
        bytes_V = np.zeros(self.vocab_size, np.int64)
        special = {entry["id"] for entry in model["added_tokens"]}
        for text, id in model["model"]["vocab"].items():
            if id not in special:
                bytes_V[id] = len(text)
        return bytes_V

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the recorded hashes of all files: equal for datasets of equal content."""
        recorded = sorted((name, record["sha256"]) for name, record in _files(self.manifest).items())
        return hashlib.sha256(json.dumps(recorded).encode()).hexdigest()

    def check_ids(self, progress: Progress = no_progress) -> None:
        """Read every id once; ValueError names the file and the byte of one that is beyond the vocabulary."""
        parts = [getattr(domain, split) for domain in self._domains.values() for split in SPLITS]
        total, done = sum(part.num_tokens for part in parts), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress("checking ids", done, total)

        for part in parts:
            part.check_ids(self.vocab_size, self.end_of_text, advance)

    def verify(self, progress: Progress = no_progress) -> None:
        """Hash every file; ValueError names the first that differs from dataset.json. `progress` counts bytes."""
        files = _files(self.manifest)
        total, done = sum(record["size"] for record in files.values()), 0
        for name, record in files.items():
            if hash_file(self.path / name).sha256 != record["sha256"]:
                raise ValueError(f"{self.path / name} is damaged (its hash is not the recorded one): prepare it again")
            done += record["size"]
            progress("verifying", done, total)

    def _entry(self, domain: str) -> Mapping[str, Any]:
        position = self.domain(domain).id
        entry: Mapping[str, Any] = self.manifest["domains"][position]
        return entry


def open_dataset(path: Path, *, check_ids: bool = True) -> Dataset:
    """Open a dataset directory.

    Raises ValueError in one line where it is no finished dataset, of an unknown format version, has a file missing, cut
    short or inconsistent, or (`check_ids`, which reads all ids once) an id beyond the vocabulary.
    """
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} is no dataset (no {MANIFEST} in it): prepare one with the data command")
    manifest = _read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path / MANIFEST}: the format version must be {FORMAT_VERSION}: prepare the dataset again")
    try:
        dataset = _build(path, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / MANIFEST} is damaged ({error!r}): prepare the dataset again") from error
    if check_ids:
        dataset.check_ids()
    return dataset


def _build(path: Path, manifest: Mapping[str, Any]) -> Dataset:
    for name, record in _files(manifest).items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: prepare the dataset again")
        if file.stat().st_size != record["size"]:
            raise ValueError(f"{file} has {file.stat().st_size} bytes instead of {record['size']}: it is damaged")
    for position, entry in enumerate(manifest["domains"]):
        if entry["id"] != position:
            raise ValueError(f"{path / MANIFEST}: domain {entry['name']!r} has id {entry['id']} at place {position}")
    dataset = Dataset(path, manifest)
    for entry in manifest["domains"]:
        for split in SPLITS:
            part = getattr(dataset.domain(entry["name"]), split)
            recorded = (entry["splits"][split]["documents"], entry["splits"][split]["tokens"])
            if recorded != (part.num_documents, part.num_tokens) or part.num_documents == 0:
                raise ValueError(
                    f"{part.idx_path}: {part.num_documents} documents of {part.num_tokens} tokens, dataset.json says "
                    f"{recorded[0]} of {recorded[1]}: it is damaged"
                )
    return dataset


def _files(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return size and hash of every file that dataset.json lists, by name; no name may leave the directory."""
    files = {TOKENIZER: manifest["tokenizer"], TOKEN_COUNTS: manifest["token_counts"]}
    for entry in manifest["domains"]:
        for split in SPLITS:
            files.update(entry["splits"][split]["files"])
    bad = [name for name in files if Path(name).name != name]
    if bad:
        raise ValueError(f"{MANIFEST}: {bad[0]!r} is not the name of a file in the dataset")
    return files


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): prepare the dataset again") from error
