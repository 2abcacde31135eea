"""Metrics: one JSON object a logged step, and TensorBoard.

Keys: step, tokens, loss, loss/<domain>, lr, grad_norm, skipped, spike, tokens_per_second, flops_share, aux_loss,
z_loss, dropped, expert_load/<layer> (most over mean load), heldout_loss/<domain>, heldout_bits_per_byte/<domain>.
"""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ..moe.storage.durable import write_file
from .trainer import StepMetrics, Trainer


class Metrics:
    """Appends to `metrics.jsonl` in `directory`, and to `tensorboard/` where asked.

    What stands there of steps after `resumed_step` (-1: the run starts afresh) is dropped: it will be written again.
    A disk that refuses ends nothing: `note` hears of it once, and the lines are kept for the next write. TensorBoard's
    writer does not survive it, and writes again when the run goes on.
    """

    def __init__(self, directory: Path, note: Callable[[str], None], *, tensorboard: bool, resumed_step: int) -> None:
        self.path = directory / "metrics.jsonl"
        keep = [line for line in _lines(self.path) if _step_of(line) <= resumed_step]
        write_file(self.path, "".join(f"{line}\n" for line in keep).encode())
        self._file = self.path.open("ab", buffering=0)
        self._whole = self._file.seek(0, os.SEEK_END)  # where the last whole line ends
        self._unwritten = b""
        self._note, self._refused = note, False
        self._writer = None
        if tensorboard:
            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, values: dict[str, Any]) -> None:
        """Write one object; `values` holds `step`. NaN and infinity, which JSON lacks, become null."""
        finite = {key: value if _is_finite(value) else None for key, value in values.items()}
        self._unwritten += json.dumps(finite, allow_nan=False).encode() + b"\n"
        self._flush()
        if self._writer is None:
            return
        try:
            for key, value in values.items():
                if key != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(key, value, values["step"])
        except OSError as error:  # of its thread, which has ended
            self._writer = None
            self._note(f"tensorboard/ is not written any more in this session: {error.strerror or error}")

    def close(self) -> None:
        """Write out what is buffered."""
        if self._unwritten:
            self._flush()
        try:
            self._file.close()
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._note(f"the last metrics are not written: {error.strerror or error}")

    def _flush(self) -> None:
        """Append what is not written yet: all of it, or nothing."""
        try:
            left = memoryview(self._unwritten)
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._whole)  # nobody reads half a line
            if not self._refused:
                self._note(f"{self.path} is not written, its lines are kept for later: {error.strerror or error}")
            self._refused = True
        else:
            self._whole += len(self._unwritten)
            self._unwritten, self._refused = b"", False


def step_values(step: StepMetrics, trainer: Trainer, *, spike: bool, speed: float, share: float) -> dict[str, Any]:
    """Return what to write of a step, at `speed` tokens a second and that `share` of the matmul peak."""
    values: dict[str, Any] = {
        "step": step.step,
        "tokens": step.step * step.tokens,
        "loss": step.loss,
        "lr": step.lr,
        "grad_norm": step.grad_norm,
        "skipped": step.skipped,
        "spike": spike,
        "tokens_per_second": speed,
        "flops_share": share,
        "aux_loss": step.aux_loss,
        "z_loss": step.z_loss,
        "dropped": step.dropped,
    }
    for name, loss, labels in zip(trainer.registry.names, step.loss_sum_N.tolist(), step.labels_N.tolist()):
        if labels:
            values[f"loss/{name}"] = loss / labels
    for layer, count_NE in step.counts.items():
        count_E = count_NE.sum(0).double()
        values[f"expert_load/{layer}"] = float(count_E.max() / count_E.mean().clamp(min=1))
    return values


def _lines(path: Path) -> list[str]:
    # A crash of the machine may leave bytes that are no text; such a line is no JSON either, and is dropped.
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _step_of(line: str) -> float:
    """Return the line's step; a line that a crash cut short counts as later than any."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return float("inf")
