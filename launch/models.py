"""The model that a command is given."""

from pathlib import Path

from ..moe.stored import StoredModel, open_model
from ..parallel.checkpointer import Checkpointer


def open_given_model(text: str) -> StoredModel:
    """Open a checkpoint, a submodel, a directory of transformers', or the newest checkpoint of a run directory."""
    path = Path(text).expanduser()
    checkpointer = Checkpointer(path / "checkpoints" if (path / "checkpoints").is_dir() else path, keep=None)
    steps = checkpointer.steps()
    return open_model(checkpointer.path(steps[-1]) if steps else path)
