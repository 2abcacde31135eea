"""The model that a command is given."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ..moe.data.dataset import Dataset
from ..moe.storage.checkpoint import MANIFEST, read_manifest, verify_files
from ..moe.stored import StoredModel, open_model
from ..moe.workers import ALONE, Workers
from ..parallel.checkpointer import Checkpointer
from .console import notes, progress_sink

_WEIGHTS = ".safetensors"


def open_given_model(text: str) -> StoredModel:
    """Open a checkpoint, a submodel, a directory of transformers', or the newest checkpoint of a run directory."""
    path = Path(text).expanduser()
    checkpointer = Checkpointer(path / "checkpoints" if (path / "checkpoints").is_dir() else path, keep=None)
    steps = checkpointer.steps()
    return open_model(checkpointer.path(steps[-1]) if steps else path)


def check_files(stored: StoredModel, *, sources: Iterable[str] | None = None, workers: Workers = ALONE) -> None:
    """Hash the files that the tensors `sources` (None: all) lie in, and the small ones beside them; a bar meanwhile.

    Each process hashes its share. Raises ValueError naming the first damaged one: the optimizer's state, which no model
    needs, is left out.
    """
    with workers.together():
        if not (stored.path / MANIFEST).is_file():
            notes().print(f"{stored.path} has no {MANIFEST}: its files are taken as they are")
            return
        manifest = read_manifest(stored.path)
        weights = {stored.tensors.file(name) for name in (stored.tensors.names() if sources is None else sources)}
        files = {str(file.relative_to(stored.path)) for file in weights}
        # Of the small files config and registry decide what is computed.
        small = {name for name in manifest["files"] if Path(name).suffix != _WEIGHTS}
        names = sorted(files | {name for name in small if not name.startswith("optimizer/")})
        with progress_sink(transient=True) as progress:
            watched = partial(progress, f"hashing {stored.path.name}")
            verify_files(stored.path, manifest, watched, only=names[workers.rank :: workers.size])


def check_tokenizer(given: str, stored: StoredModel, dataset: Dataset) -> None:
    """Raise ValueError where the ids of `dataset` do not mean to the model `given` what they mean there."""
    if stored.tokenizer is None:
        raise ValueError(f"{given} has no tokenizer.json: nothing says that it reads the token ids of {dataset.path}")
    if stored.tokenizer != dataset.tokenizer_path.read_bytes():
        raise ValueError(f"{given} has another tokenizer than {dataset.path}: give the dataset it was trained on")
    if stored.config.vocab_size < dataset.vocab_size:
        raise ValueError(
            f"{given} has a vocabulary of {stored.config.vocab_size}, but {dataset.path} has token ids up to "
            f"{dataset.vocab_size - 1}: give another dataset"
        )
