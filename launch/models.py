"""The model that a command is given."""

from pathlib import Path

from ..moe.data.dataset import Dataset
from ..moe.stored import StoredModel, open_model
from ..parallel.checkpointer import Checkpointer


def open_given_model(text: str) -> StoredModel:
    """Open a checkpoint, a submodel, a directory of transformers', or the newest checkpoint of a run directory."""
    path = Path(text).expanduser()
    checkpointer = Checkpointer(path / "checkpoints" if (path / "checkpoints").is_dir() else path, keep=None)
    steps = checkpointer.steps()
    return open_model(checkpointer.path(steps[-1]) if steps else path)


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
