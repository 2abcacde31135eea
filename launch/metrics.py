"""Metrics: one JSON object a logged step, and TensorBoard.

Keys: step, tokens, loss, loss/<domain>, lr, grad_norm, tokens_per_second, flops_share, aux_loss, z_loss, dropped,
expert_load/<layer> (most over mean load), heldout_loss/<domain>, heldout_bits_per_byte/<domain>.
"""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ..moe.storage.durable import write_file


class Metrics:
    """Appends to `metrics.jsonl` in `directory`, and to `tensorboard/` where asked.

    What stands there of steps after `resumed_step` (-1: the run starts afresh) is dropped: it will be written again.
    """

    def __init__(self, directory: Path, *, tensorboard: bool, resumed_step: int) -> None:
        self.path = directory / "metrics.jsonl"
        keep = [line for line in _lines(self.path) if _step_of(line) <= resumed_step]
        write_file(self.path, "".join(f"{line}\n" for line in keep).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, values: dict[str, Any]) -> None:
        """Write one object; `values` holds `step`."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in values.items():
                if key != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(key, value, values["step"])

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _step_of(line: str) -> float:
    """Return the line's step; a line that a crash cut short counts as later than any."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
