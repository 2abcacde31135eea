"""One session of a run: begins or resumes it, steps, logs, evaluates, saves, and stops cleanly on Ctrl-C."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed

from ..benchmarks.machine import matmul_rate
from ..moe.counts import train_flops
from ..moe.storage.checkpoint import checkpoint_bytes
from ..moe.storage.durable import WriteError, require_space
from ..parallel.agreement import together
from ..parallel.checkpointer import Checkpointer
from ..parallel.collectives import all_reduce
from .evaluation import Losses, evaluate_domains
from .layout_costs import DTYPES
from .metrics import Metrics
from .progress import TrainProgress
from .run_state import checkpoint_content, restore
from .trainer import StepMetrics, Trainer


@dataclass(frozen=True, kw_only=True)
class SessionResult:
    """How a session ended."""

    seconds: float  # spent in optimizer steps
    tokens: int
    matmul_rate: float
    interrupted: bool


class Session:
    """Drives a trainer up to the run's last step, or `stop_at`, or a signal. Of several ranks the first one logs."""

    def __init__(self, trainer: Trainer, directory: Path, progress: TrainProgress) -> None:
        self.trainer, self.config, self.directory, self.progress = trainer, trainer.config, directory, progress
        self.world = trainer.mesh.world
        self.checkpointer = Checkpointer(directory / "checkpoints", keep=self.config.save.keep, world=self.world)
        self.stop = False
        self.matmul_rate = 0.0
        self.flops = train_flops(self.config.model, trainer.registry, self.config.sequence_length)
        self.before: Losses = {}
        self.after: Losses = {}
        self.saved_step: int | None = None
        self.resumed_step = -1  # the session begins with step 0 itself

    def resume(self) -> bool:
        """Go to the newest checkpoint that verifies, if there is one; check that the next one fits on the disk."""
        checkpoint = self.checkpointer.load_latest(self.progress.note)
        if checkpoint is not None:
            self.before, self.after = restore(self.trainer, checkpoint)
            self.saved_step = self.resumed_step = self.trainer.step
            self.progress.note(f"resuming {self.directory} at step {self.trainer.step}")
        content = checkpoint_content(self.trainer, self.before, self.after)
        with together(self.world):
            require_space(self.directory, checkpoint_bytes(content))
        return checkpoint is not None

    def run(self) -> SessionResult:
        """Train to the end of the session and save."""
        config, trainer = self.config, self.trainer
        metrics = None
        with together(self.world):
            if self.world.rank == 0:
                self.matmul_rate = matmul_rate(trainer.device, DTYPES[config.precision])
                tensorboard = config.logger.tensorboard
                metrics = Metrics(self.directory, tensorboard=tensorboard, resumed_step=self.resumed_step)
        seconds, first = 0.0, trainer.step
        try:
            # Until all is saved: a SIGTERM in the last evaluation must not cost what was trained.
            with self._signals(), self.progress.steps(trainer.step, config.steps):
                self.after = {}
                if not self.before:
                    self.before = self._evaluate(metrics)
                while trainer.step < config.last_step and not self._asked_to_stop():
                    begin = time.perf_counter()
                    step = trainer.train_step()
                    elapsed = time.perf_counter() - begin
                    seconds += elapsed
                    self._after_step(step, elapsed, metrics)
                if trainer.step == config.steps:
                    self.after = self._evaluate(metrics)
                if self.saved_step != trainer.step:
                    self._save()
        finally:
            if metrics is not None:
                metrics.close()
        return SessionResult(
            seconds=seconds,
            tokens=(trainer.step - first) * config.global_batch * config.sequence_length,
            matmul_rate=self.matmul_rate,
            interrupted=self.stop,
        )

    def _after_step(self, step: StepMetrics, elapsed: float, metrics: Metrics | None) -> None:
        config = self.config
        self._log(step, elapsed, metrics)
        if config.evaluate.every and step.step % config.evaluate.every == 0 and step.step < config.steps:
            self._evaluate(metrics)
        # The last step is saved after its evaluation: a run whose last step is saved has nothing left to do.
        if config.save.every and step.step % config.save.every == 0 and step.step < config.steps:
            self._try_save()

    def _log(self, step: StepMetrics, elapsed: float, metrics: Metrics | None) -> None:
        if metrics is None:
            return
        speed = step.tokens / elapsed
        share = speed * self.flops / (self.matmul_rate * self.world.size)
        self.progress.step(step, speed, share)
        if step.step % self.config.logger.every == 0 or step.step == self.config.steps or step.skipped:
            metrics.write(_values(step, self.trainer, speed, share))

    def _asked_to_stop(self) -> bool:
        """Whether any rank was: all stop after the same step."""
        asked = all_reduce(torch.tensor(int(self.stop)), self.world, distributed.ReduceOp.MAX)
        if asked:  # else a signal that comes right now would be lost
            self.stop = True
        return bool(asked)

    def _evaluate(self, metrics: Metrics | None) -> Losses:
        dp = self.trainer.mesh.dp
        losses = evaluate_domains(
            self.trainer.model,
            self.trainer.loader,
            batch_size=self.config.micro_size(dp.size) * dp.size,
            max_tokens=self.config.evaluate.tokens,
            on_domain=self.progress.evaluating,
            dp=dp,
        )
        values: dict[str, Any] = {"step": self.trainer.step}
        for name, loss in losses.items():
            values[f"heldout_loss/{name}"] = loss.loss
            values[f"heldout_bits_per_byte/{name}"] = loss.bits_per_byte
        if metrics is not None:
            metrics.write(values)
        return losses

    def _try_save(self) -> None:
        """Save in mid-run, where a full disk is no reason to stop: the checkpoint before still stands."""
        try:
            self._save()
        except WriteError as error:
            self.progress.note(f"step {self.trainer.step} is not saved, training goes on: {error}")

    def _save(self) -> None:
        self.progress.note(f"saving step {self.trainer.step}")
        self.checkpointer.save(self.trainer.step, checkpoint_content(self.trainer, self.before, self.after))
        self.saved_step = self.trainer.step

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a stop after the current step, saved; a second SIGINT is Python's own."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.progress.urgent("stopping after this step; press Ctrl-C again to stop without saving")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _values(step: StepMetrics, trainer: Trainer, speed: float, share: float) -> dict[str, Any]:
    values: dict[str, Any] = {
        "step": step.step,
        "tokens": step.step * step.tokens,
        "loss": step.loss,
        "lr": step.lr,
        "grad_norm": step.grad_norm,
        "skipped": step.skipped,
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
