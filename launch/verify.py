"""`sigmoe verify`: hashes every file of a checkpoint, finds every expert once, compares shapes; or hashes a dataset."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..moe.canonical import expected_shapes
from ..moe.config import ModelConfig
from ..moe.data.dataset import open_dataset
from ..moe.data.progress import Progress
from ..moe.domains import DomainRegistry
from ..moe.parsing import from_mapping
from ..moe.storage.checkpoint import (
    MANIFEST,
    Checkpoint,
    check_experts,
    open_checkpoint,
    read_manifest,
    verify_files,
)
from ..moe.storage.tensors import TensorReader
from ..moe.stored import open_model
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
    """Verify the checkpoint `target`, or the newest (or `every`) checkpoint of the run that it names."""
    for path in find_checkpoints(target, every=every):
        if (path / "config.json").is_file():
            verify_submodel(path)
            continue
        with progress_sink(transient=True) as progress:
            checkpoint = verify_checkpoint(path, progress)
        files = checkpoint.manifest["files"]
        results().print(
            f"ok  {path}  step {checkpoint.state.get('step')}  {len(files) + 1} files  "
            f"{sum(record['size'] for record in files.values()):,} bytes  "
            f"{len(checkpoint.manifest['experts'])} experts",
            soft_wrap=True,
        )


def verify_submodel(path: Path) -> None:
    """Verify a submodel in a format of transformers; ValueError names the first bad file, expert or tensor."""
    manifest = read_manifest(path)
    with progress_sink(transient=True) as progress:
        verify_files(path, manifest, lambda done, total: progress(f"hashing {path.name}", done, total))
    stored = open_model(path)
    check_experts(path, manifest, stored.tensors.names())
    results().print(
        f"ok  {path}  {stored.format}  {len(manifest['files']) + 1} files  "
        f"{sum(record['size'] for record in manifest['files'].values()):,} bytes  {len(manifest['experts'])} experts",
        soft_wrap=True,
    )


def find_checkpoints(path: Path, *, every: bool) -> list[Path]:
    """Return `path` itself where it is a checkpoint, else the newest (or `every`) checkpoint of the run it names."""
    if (path / MANIFEST).is_file():
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpointer = Checkpointer(folder, keep=None)
    steps = checkpointer.found()
    if not steps:
        raise ValueError(f"{path} holds no {MANIFEST}, nor checkpoints: give a step directory or a run directory")
    return [checkpointer.path(step) for step in (steps if every else steps[-1:])]


def verify_checkpoint(path: Path, progress: Progress) -> Checkpoint:
    """Return the checkpoint after every check has passed."""
    checkpoint = open_checkpoint(path)
    checkpoint.verify(lambda done, total: progress(f"hashing {path.name}", done, total))
    try:
        model = from_mapping(ModelConfig, checkpoint.config.get("model"), "model")
        expected = expected_shapes(model, DomainRegistry.from_json(checkpoint.registry))
    except ValueError as error:
        raise ValueError(f"{path}: config.yaml and registry.json describe no model: {error}") from error
    for name in sorted(set(expected) ^ set(checkpoint.model.names())):
        state = "lacks" if name in expected else "holds"
        raise ValueError(f"{path}/model {state} {name}, unlike its config.yaml and registry.json")
    for name, shape in expected.items():
        _check_shape(path / "model", checkpoint.model, name, shape)
    if checkpoint.optimizer is not None:
        for name in checkpoint.optimizer.names():
            parameter, _, kind = name.rpartition(".")
            if parameter not in expected:
                raise ValueError(f"{path}/optimizer holds {name}, unlike its config.yaml and registry.json")
            _check_shape(path / "optimizer", checkpoint.optimizer, name, () if kind == "step" else expected[parameter])
    return checkpoint


def _check_shape(folder: Path, tensors: TensorReader, name: str, shape: tuple[int, ...]) -> None:
    held = tensors.shape(name)
    if held != shape:
        raise ValueError(f"{folder}: {name} is {list(held)}, config.yaml and registry.json say {list(shape)}")


if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
