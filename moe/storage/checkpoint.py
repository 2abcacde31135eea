"""One checkpoint directory: canonical tensors, state, config, registry, tokenizer, and last the manifest that vouches.

    model/ optimizer/ state.json config.yaml registry.json tokenizer.json manifest.json

`manifest.json` holds size and SHA-256 of every other file and of itself, and each global expert once. Without it, or
with one that does not match, a directory is no checkpoint.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..canonical import expert_of
from .durable import DurableDirectory, durable_directory
from .hashing import hash_file
from .tensor_format import load_json
from .tensors import NamedTensor, TensorReader, write_tensors

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointContent:
    """What a checkpoint is made of. Tensors carry canonical names and are read while they are written."""

    model: Mapping[str, NamedTensor]
    optimizer: Mapping[str, NamedTensor]
    state: Mapping[str, Any]  # plain JSON data
    config: Mapping[str, Any]  # plain YAML data
    registry: Mapping[str, Any]
    tokenizer: bytes | None
    hf_config: Mapping[str, Any] | None  # config.json of model/, where transformers knows such a model


class Checkpoint:
    """An open checkpoint; made by `open_checkpoint`. Tensors are read on demand, files hashed by `verify` alone."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.state = _mapping(path / "state.json", _parsed(path / "state.json"))
        self.registry = _mapping(path / "registry.json", _parsed(path / "registry.json"))
        self.config = _mapping(path / "config.yaml", load_yaml(path / "config.yaml"))
        self.model = TensorReader(path / "model", "model")
        self.optimizer = TensorReader(path / "optimizer", "optimizer") if (path / "optimizer").is_dir() else None

    @property
    def tokenizer(self) -> bytes | None:
        """The tokenizer's file, where the checkpoint has one."""
        path = self.path / "tokenizer.json"
        return _read(path) if path.exists() else None

    def verify(
        self, progress: Callable[[int, int], None] = lambda done, total: None, *, part: slice = slice(None)
    ) -> None:
        """Check every file's size and hash against the manifest, and that each global expert is there exactly once.

        `progress` hears bytes done and in all. Only the files of `part`, in order of their names, are read: several
        may share the work. Raises ValueError naming the first bad file or expert.
        """
        check_no_others(self.path, self.manifest)
        verify_files(self.path, self.manifest, progress, only=sorted(self.manifest["files"])[part])
        check_experts(self.path, self.manifest, self.model.names())


def write_checkpoint(path: Path, content: CheckpointContent, *, replace: bool = False) -> None:
    """Write a checkpoint that appears under `path` complete or not at all; the manifest is its last file.

    Raises ValueError where `path` exists (unless `replace`), WriteError where the disk refuses.
    """
    with durable_directory(path, replace=replace) as directory:
        write_content(directory, content)
        write_manifest(directory, content.model)


def write_content(directory: DurableDirectory, content: CheckpointContent) -> None:
    """Write all of a checkpoint but the manifest."""
    write_tensors(directory, "model", "model", content.model)
    if content.optimizer:
        write_tensors(directory, "optimizer", "optimizer", content.optimizer)
    write_documents(directory, content)


def write_documents(directory: DurableDirectory, content: CheckpointContent) -> None:
    """Write all of a checkpoint but tensors and manifest."""
    if content.hf_config is not None:
        directory.write("model/config.json", encode_json(content.hf_config))
    directory.write("state.json", encode_json(content.state))
    directory.write("config.yaml", yaml.safe_dump(dict(content.config), sort_keys=False).encode())
    directory.write("registry.json", encode_json(content.registry))
    if content.tokenizer is not None:
        directory.write("tokenizer.json", content.tokenizer)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint `path`; ValueError in one line where it is none, damaged in form, or of a newer format."""
    return Checkpoint(path, read_manifest(path))


def read_manifest(path: Path) -> Mapping[str, Any]:
    """Return the manifest of the checkpoint `path`, checked in form; ValueError in one line."""
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no {MANIFEST}")
    manifest = _mapping(file, _parsed(file))
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format version {version!r}, this sigmoe reads {FORMAT_VERSION}: use the sigmoe that wrote it"
        )
    if _read(file) != encode_manifest(manifest):
        raise ValueError(f"{file} is damaged: its SHA-256 of itself does not match")
    files, experts = manifest.get("files"), manifest.get("experts")
    if not isinstance(files, dict) or not isinstance(experts, list):
        raise ValueError(f"{file} lacks files or experts: it is damaged")
    for name, record in files.items():
        outside = name.startswith("/") or ".." in Path(name).parts
        if not isinstance(record, dict) or type(record.get("size")) is not int or outside:
            raise ValueError(f"{file}: the entry of {name!r} is damaged")
    for expert in experts:
        if not isinstance(expert, list) or [type(part) for part in expert] != [int, int]:
            raise ValueError(f"{file}: {expert!r} is no pair of layer and expert: it is damaged")
    return manifest


def verify_files(
    path: Path,
    manifest: Mapping[str, Any],
    progress: Callable[[int, int], None],
    *,
    only: Iterable[str] | None = None,
) -> None:
    """Compare every file with the manifest, or those named in `only`; ValueError names the first that differs.

    It may be missing, foreign to the manifest, or of another size or hash.
    """
    if only is None:
        check_no_others(path, manifest)
    for name in sorted(set(only or ()) - set(manifest["files"])):
        raise ValueError(f"{path / name} is not in the manifest: it was added after the checkpoint was written")
    records = {name: manifest["files"][name] for name in sorted(manifest["files"] if only is None else only)}
    done, total = 0, sum(record["size"] for record in records.values())

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for name, record in records.items():
        file = path / name
        if not file.is_file() or file.is_symlink():
            raise ValueError(f"{file} is missing, or is no file but a link")
        size = file.stat().st_size
        if size != record["size"]:
            raise ValueError(f"{file} has {size:,} bytes instead of {record['size']:,}: it is damaged")
        if _hash(file, advance) != record.get("sha256"):
            raise ValueError(f"{file} is damaged: its SHA-256 is not the one in the manifest")


def check_no_others(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first file which the manifest does not know."""
    present = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()} - {MANIFEST}
    for name in sorted(present - set(manifest["files"])):
        raise ValueError(f"{path / name} is not in the manifest: it was added after the checkpoint was written")


def check_experts(path: Path, manifest: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Check that the tensors hold the manifest's experts, each exactly once and whole (three weights)."""
    held = Counter(expert for expert in map(expert_of, names) if expert is not None)
    listed = [(layer, expert) for layer, expert in manifest["experts"]]
    if len(set(listed)) != len(listed):
        raise ValueError(f"{path / MANIFEST} lists an expert twice")
    for layer, expert in sorted(set(listed) ^ set(held)):
        where = "the manifest" if (layer, expert) not in set(listed) else "model/"
        raise ValueError(f"{path}: expert {expert} of layer {layer} is missing from {where}")
    for (layer, expert), count in sorted(held.items()):
        if count != 3:
            raise ValueError(f"{path}: expert {expert} of layer {layer} has {count} of its 3 weights")


def checkpoint_bytes(content: CheckpointContent) -> int:
    """Return about how many bytes the checkpoint takes on disk: its tensors, and a margin for the rest."""
    tensors = [*content.model.values(), *content.optimizer.values()]
    names = [*content.model, *content.optimizer]
    # Each name stands in a header and in an index, with offsets, a shape and a file's name.
    data = sum(tensor.num_bytes for tensor in tensors) + sum(2 * len(name) + 192 for name in names)
    return data + len(content.tokenizer or b"") + (1 << 20)


def load_yaml(path: Path) -> object:
    """Parse a YAML file into plain data; ValueError in one line where it is none."""
    data = _read(path)
    try:
        return yaml.safe_load(data)
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from error
    # PyYAML's constructors trust a tag: `!!int ""` is an IndexError, `!!bool x` a KeyError, `!!timestamp x` an
    # AttributeError, 2001-99-99 a ValueError (PyYAML 6.0).
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def write_manifest(directory: DurableDirectory, names: Iterable[str]) -> None:
    """Write the manifest, the last file: every file written before, and the experts among the tensors' `names`."""
    experts = {expert for expert in map(expert_of, names) if expert is not None}
    files = {name: {"size": record.size, "sha256": record.sha256} for name, record in sorted(directory.records.items())}
    manifest = {
        "format_version": FORMAT_VERSION,
        "files": files,
        "experts": [list(expert) for expert in sorted(experts)],
    }
    directory.write(MANIFEST, encode_manifest(manifest))


def encode_json(data: Mapping[str, Any]) -> bytes:
    """Return a JSON file of the house: indented, UTF-8, no NaN."""
    return (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Return the manifest's file: its last key is the SHA-256 of the same text without that key."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, indent=1).encode()
    return json.dumps({**content, "sha256": hashlib.sha256(text).hexdigest()}, indent=1).encode() + b"\n"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _hash(path: Path, progress: Callable[[int], None]) -> str:
    try:
        return hash_file(path, progress).sha256
    except OSError as error:  # a bad sector damages a file as a flipped bit does
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _parsed(path: Path) -> object:
    data = _read(path)
    try:
        return load_json(data)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _mapping(path: Path, data: object) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged: it holds no group of keys")
    return data
