"""Metrics: one JSON object a logged step, and TensorBoard.

Keys: step, tokens, loss, loss/<domain>, lr, grad_norm, skipped, spike, tokens_per_second, flops_share, aux_loss,
z_loss, dropped, expert_load/<layer> (most over mean load), heldout_loss/<domain>, heldout_bits_per_byte/<domain>.
"""

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ..moe.storage.durable import write_file
from .trainer import StepMetrics, Trainer


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
        """Write one object; `values` holds `step`. NaN and infinity, which JSON lacks, become null."""
        finite = {key: value if _is_finite(value) else None for key, value in values.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
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
