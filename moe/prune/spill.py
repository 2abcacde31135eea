"""The work folder of a calibration: what is needed to go on after a kill at the last finished step.

    settings.json           what is calibrated; under other settings all that lies here is thrown away
    hidden-00003-00012...   the hidden states of batch 12 after step 3, until step 4 is finished
    step-00003...           the sums of step 3; its being there says that the step is finished

Every file is written aside, fsynced and renamed. Several workers may share the folder: each writes the batches that it
ran, and one of them, the lead, everything else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..storage.checkpoint import encode_json
from ..storage.durable import make_directory, remove_stale, write_file
from ..storage.tensor_format import encode_header
from ..storage.tensor_reader import TensorReader

_SETTINGS = "settings.json"
_SUFFIX = ".safetensors"


class Spill:
    """A work folder under `folder`; `prepare` comes first, and on the lead alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self, settings: Mapping[str, Any]) -> int:
        """Make the folder, empty it where it belongs to other `settings`, and return how many steps are finished."""
        make_directory(self._folder)
        remove_stale(self._folder)
        file, wanted = self._folder / _SETTINGS, encode_json(settings)
        if not file.is_file() or file.read_bytes() != wanted:
            file.unlink(missing_ok=True)
            for old in [*self._folder.glob(f"hidden-*{_SUFFIX}"), *self._folder.glob(f"step-*{_SUFFIX}")]:
                old.unlink()
            write_file(file, wanted)
        finished = 0
        while self._path(f"step-{finished:05d}").is_file():
            finished += 1
        return finished

    def write_hidden(self, step: int, batch: int, x_BSD: Tensor) -> None:
        """Put a batch's fp32 hidden states after `step` aside."""
        self._write(f"hidden-{step:05d}-{batch:05d}", x_BSD)

    def read_hidden(self, step: int, batch: int) -> Tensor:
        """Return what `write_hidden` was given."""
        return self._read(f"hidden-{step:05d}-{batch:05d}")

    def finish(self, step: int, sums: Tensor) -> None:
        """Say that all batches have passed `step`, which gave `sums`; the hidden states of other steps go."""
        self._write(f"step-{step:05d}", sums)
        for file in self._folder.glob(f"hidden-*{_SUFFIX}"):
            if not file.name.startswith(f"hidden-{step:05d}-"):
                file.unlink()

    def sums(self, step: int) -> Tensor:
        """Return the sums of a finished step."""
        return self._read(f"step-{step:05d}")

    def _path(self, stem: str) -> Path:
        return self._folder / f"{stem}{_SUFFIX}"

    def _write(self, stem: str, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        data = tensor.view(-1).view(torch.uint8).numpy().data
        write_file(self._path(stem), [encode_header({"x": (tuple(tensor.shape), tensor.dtype)}), data])

    def _read(self, stem: str) -> Tensor:
        return TensorReader(self._folder, stem).read("x")
