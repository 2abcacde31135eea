"""`sigmoe verify`: hashes every file of a checkpoint, finds every expert once, compares shapes; or hashes a dataset."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..moe.data.dataset import open_dataset
from ..moe.data.progress import Progress
from ..moe.parsing import from_mapping
from ..moe.storage.checkpoint import MANIFEST, check_experts, read_manifest, verify_files
from ..moe.storage.tensor_reader import TensorReader
from ..moe.stored import StoredModel, open_model
from ..parallel.checkpointer import Checkpointer
from .console import progress_sink, results
from .main import main


@dataclass(frozen=True, kw_only=True)
class VerifyCommand:
    """The keys of `sigmoe verify`: one of `checkpoint` and `dataset`."""

    checkpoint: str | None = None
    dataset: str | None = None
    all: bool = False

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.dataset is None):
            raise ValueError("missing key: give checkpoint=DIR or dataset=DIR, one of them")


def run(config: Mapping[str, object]) -> None:
    """Verify what `config` names; ValueError names the first bad file, expert or tensor."""
    command = from_mapping(VerifyCommand, config)
    if command.dataset is not None:
        verify_dataset(Path(command.dataset).expanduser())
    if command.checkpoint is not None:
        verify_checkpoints(Path(command.checkpoint).expanduser(), every=command.all)


def verify_dataset(path: Path) -> None:
    """Hash every file of a dataset and check every token id; ValueError names the first bad file."""
    with progress_sink(transient=True) as progress:
        dataset = open_dataset(path, check_ids=False)
        dataset.verify(progress)
        dataset.check_ids(progress)
    tokens = sum(dataset.domain(name).train.num_tokens for name in dataset.domain_names)
    results().print(f"ok  {path}  {len(dataset.domain_names)} domains  {tokens:,} training tokens", soft_wrap=True)


def verify_checkpoints(target: Path, *, every: bool) -> None:
    """Verify the checkpoint or submodel `target`, or the newest (or `every`) checkpoint of the run that it names."""
    for path in find_checkpoints(target, every=every):
        with progress_sink(transient=True) as progress:
            manifest, stored = verify_model(path, progress)
        files, experts = manifest["files"], manifest["experts"]
        layers = len({layer for layer, _ in experts})
        results().print(
            f"ok  {path}  {stored.format if stored.step is None else f'step {stored.step}'}  {len(files) + 1} files  "
            f"{sum(record['size'] for record in files.values()):,} bytes  "
            f"{len(experts)} experts in {layers} layers",
            soft_wrap=True,
        )


def find_checkpoints(path: Path, *, every: bool) -> list[Path]:
    """Return `path` itself where it is a checkpoint, else the newest (or `every`) checkpoint of the run it names."""
    if (path / MANIFEST).is_file():
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpointer = Checkpointer(folder, keep=None)
    steps = checkpointer.found()
    if not steps and (path / "config.json").is_file():
        raise ValueError(f"{path} holds no {MANIFEST} to verify by: directories of transformers' have none; convert it")
    if not steps:
        raise ValueError(f"{path} holds no {MANIFEST}, nor checkpoints: give a step directory or a run directory")
    return [checkpointer.path(step) for step in (steps if every else steps[-1:])]


def verify_model(path: Path, progress: Progress) -> tuple[Mapping[str, Any], StoredModel]:
    """Return the manifest and the model of a checkpoint or submodel after every check has passed."""
    manifest = read_manifest(path)
    verify_files(path, manifest, partial(progress, f"hashing {path.name}"))
    stored = open_model(path)
    check_experts(path, manifest, stored.tensors.names())
    if (path / "optimizer").is_dir():
        check_optimizer(path / "optimizer", stored.tensors)
    return manifest, stored


def check_optimizer(folder: Path, model: TensorReader) -> None:
    """Raise ValueError for optimizer state of no parameter of `model`, or of another shape."""
    parameters, optimizer = set(model.names()), TensorReader(folder, "optimizer")
    for name in optimizer.names():
        parameter, _, kind = name.rpartition(".")
        if parameter not in parameters:
            raise ValueError(f"{folder} holds {name}, unlike its config.yaml and registry.json")
        held, wanted = optimizer.shape(name), () if kind == "step" else model.shape(parameter)
        if held != wanted:
            raise ValueError(f"{folder}: {name} is {list(held)}, config.yaml and registry.json say {list(wanted)}")


if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
