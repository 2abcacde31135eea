"""One session of a run: begins or resumes it, steps, logs, evaluates, saves, and stops cleanly when asked to."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ..benchmarks.machine import matmul_rate
from ..moe.counts import train_flops
from ..moe.storage.checkpoint import CheckpointContent, checkpoint_bytes
from ..moe.storage.durable import require_space
from ..parallel.agreement import together
from ..parallel.checkpointer import Checkpointer
from ..parallel.collectives import all_reduce
from ..parallel.mesh import background_axis
from .evaluation import Losses, evaluate_domains
from .guard import Verdict
from .layout_costs import DTYPES
from .metrics import Metrics, step_values
from .progress import TrainProgress
from .run_state import checkpoint_content, restore
from .saves import Saves
from .stop import StopRequest
from .trainer import StepMetrics, Trainer
from .watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class SessionResult:
    """How a session ended."""

    seconds: float  # spent in optimizer steps
    tokens: int
    matmul_rate: float
    interrupted: bool


class _StoppedError(Exception):
    """An evaluation was given up: some rank was asked to stop."""


class Session:
    """Drives a trainer up to the run's last step, or `stop_at`, or a signal. Of several ranks the first one logs."""

    def __init__(
        self, trainer: Trainer, directory: Path, progress: TrainProgress, stop: StopRequest, watchdog: Watchdog
    ) -> None:
        self.trainer, self.config, self.directory, self.progress = trainer, trainer.config, directory, progress
        self.stop, self.watchdog = stop, watchdog
        self.world = trainer.mesh.world
        save = self.config.save
        background = background_axis(self.world, self.config.parallel.timeout) if save.beside_training else None
        self.checkpointer = Checkpointer(
            directory / "checkpoints",
            keep=save.keep,
            every=save.every,
            note=progress.note,
            world=self.world,
            background=background,
        )
        patience = self.config.parallel.timeout
        self.saves = Saves(self.checkpointer, progress.note, background=save.beside_training, patience=patience)
        self.stopping = False  # some rank was asked to, and all know it
        self.matmul_rate = 0.0
        self.flops = train_flops(self.config.model, trainer.registry, self.config.sequence_length)
        self.before: Losses = {}
        self.after: Losses = {}
        self.resumed_step = -1  # the session begins with step 0 itself

    def resume(self) -> bool:
        """Go to the newest checkpoint that verifies, if there is one; check that the next one fits on the disk."""
        checkpoint = self.checkpointer.load_latest(self.progress.note)
        if checkpoint is not None:
            self.before, self.after = restore(self.trainer, checkpoint)
            self.resumed_step = self.trainer.step
            self.saves.saved_step = None if self.lacks_evaluation else self.trainer.step
            self.progress.note(f"resuming {self.directory} at step {self.trainer.step}")
        content = self._content()
        with together(self.world):
            require_space(self.directory, checkpoint_bytes(content))
        return checkpoint is not None

    @property
    def lacks_evaluation(self) -> bool:
        """Whether the run has ended but for its last evaluation."""
        return self.trainer.step == self.config.steps and not self.after

    def run(self) -> SessionResult:
        """Train to the end of the session and save."""
        config, trainer = self.config, self.trainer
        metrics = None
        with together(self.world):
            if self.world.rank == 0:
                self.matmul_rate = matmul_rate(trainer.device, DTYPES[config.precision])
                tensorboard = config.logger.tensorboard
                metrics = Metrics(
                    self.directory, self.progress.note, tensorboard=tensorboard, resumed_step=self.resumed_step
                )
        seconds, first = 0.0, trainer.step
        try:
            # Until all is saved: a signal in the last evaluation must not cost what was trained.
            with self.stop.interruptible(), self.progress.steps(trainer.step, config.steps), self.saves.joined():
                self._agree()
                self.after = {}
                self.before = self.before or self._evaluate(metrics)
                while trainer.step < config.last_step and not self.stopping:
                    self.watchdog.tell(f"step {trainer.step + 1}")
                    begin = time.perf_counter()
                    step = trainer.train_step()
                    elapsed = time.perf_counter() - begin
                    seconds += elapsed
                    self._after_step(step, elapsed, metrics)
                if trainer.step == config.steps:
                    self.after = self._evaluate(metrics)
                if trainer.step or self.before:  # else there is nothing yet
                    self.watchdog.tell(f"saving step {trainer.step}")
                    self.saves.finish(trainer.step, self._content)
        finally:
            if metrics is not None:
                metrics.close()
        return SessionResult(
            seconds=seconds,
            tokens=(trainer.step - first) * config.global_batch * config.sequence_length,
            matmul_rate=self.matmul_rate,
            interrupted=self.stopping,
        )

    def _after_step(self, step: StepMetrics, elapsed: float, metrics: Metrics | None) -> None:
        config, guard = self.config, self.trainer.guard
        loss = self._agree(0.0 if step.skipped else step.loss)
        verdict = guard.observe(loss, skipped=step.skipped, phase=config.phase_at(step.step - 1))
        self._log(step, verdict, elapsed, metrics)
        self._heed(step, verdict)
        self.saves.look()
        if config.evaluate.every and step.step % config.evaluate.every == 0 and step.step < config.steps:
            self._evaluate(metrics)
        # The last step is saved after its evaluation: a run whose last step is saved has nothing left to do.
        if config.save.every and step.step % config.save.every == 0 and step.step < config.steps:
            self.watchdog.tell(f"saving step {step.step}")
            self.saves.begin(step.step, self._content)

    def _heed(self, step: StepMetrics, verdict: Verdict) -> None:
        """Do what the guard says after a step. Raises ValueError where the run is to end."""
        guard, note = self.trainer.guard, self.progress.note
        if verdict.deviations is not None:
            note(
                f"step {step.step}: loss {step.loss:.3f} is a spike, {verdict.deviations:.1f} deviations above the mean"
            )
        last = step.step - guard.bad  # that was good
        once = guard.bad == guard.config.patience or verdict.end  # a streak that was not gone behind goes on
        if once and guard.may_go_back and self._go_back(last):
            return
        if verdict.lasts and verdict.deviations is not None:
            note(f"the loss has stayed there for {guard.bad} steps: that is the usual level from now on")
            guard.settle()
        if verdict.end:
            self.saves.wait()
            stand = [other for other in self.checkpointer.steps() if other <= last]
            whence = f"initial={self.checkpointer.path(stand[-1])}" if stand else "no initial="
            raise ValueError(
                f"{guard.skipped} steps in a row were skipped; at step {step.step} the loss is {step.loss:.4g} and the "
                f"gradient norm {step.grad_norm:.4g}; "
                + (f"the newest checkpoint before them is of step {stand[-1]}" if stand else "no checkpoint is older")
                + f": set guard.rollback=true, raise guard.max_skipped, or begin another out= with {whence} and a "
                "lower optim.lr"
            )

    def _go_back(self, last: int) -> bool:
        """Take over the newest checkpoint up to step `last`, and stay at this step; return whether there is one.

        What lies between, data and all, is left out, as PaLM's authors did (arXiv 2204.02311, section 5.1).
        """
        trainer, step, skipped = self.trainer, self.trainer.step, self.trainer.skipped
        self.watchdog.tell(f"going back from step {step}")
        self.saves.wait()
        try:
            checkpoint = self.checkpointer.load_latest(self.progress.note, last=last)
        except ValueError as error:  # the same on all ranks; the weights at hand are better than an end
            self.progress.note(f"step {step}: not gone back: {error}")
            return False
        if checkpoint is None:
            self.progress.note(f"step {step}: there is no checkpoint of mid-run up to step {last} to go back to")
            return False
        restore(trainer, checkpoint)
        trainer.guard.rolled_back = (trainer.step, step)
        self.progress.note(
            f"step {step}: back to the weights and moments of step {trainer.step}, without the data of the "
            f"{step - trainer.step} steps since"
        )
        trainer.step, trainer.skipped = step, skipped
        return True

    def _log(self, step: StepMetrics, verdict: Verdict, elapsed: float, metrics: Metrics | None) -> None:
        if metrics is None:
            return
        speed = step.tokens / elapsed
        share = speed * self.flops / (self.matmul_rate * self.world.size)
        self.progress.step(step, speed, share)
        spike = verdict.deviations is not None
        if step.step % self.config.logger.every == 0 or step.step == self.config.steps or step.skipped or spike:
            metrics.write(step_values(step, self.trainer, spike=spike, speed=speed, share=share))

    def _agree(self, loss: float = 0.0) -> float:
        """Return the largest of the ranks' losses; and learn whether one was asked to stop: all stop together."""
        told = torch.tensor([float(self.stop.asked), loss], dtype=torch.float64)
        told = all_reduce(told, self.world, distributed.ReduceOp.MAX)
        self.stopping = bool(told[0])
        return float(told[1])

    def _evaluate(self, metrics: Metrics | None) -> Losses:
        """Return the held-out losses; none where a rank is asked to stop meanwhile."""
        dp = self.trainer.mesh.dp

        def begin(domain: str) -> None:
            self.watchdog.tell(f"evaluating {domain}")
            self.progress.evaluating(domain)
            self._agree()
            if self.stopping:
                raise _StoppedError

        try:
            losses = evaluate_domains(
                self.trainer.model,
                self.trainer.loader,
                batch_size=self.config.micro_size(dp.size) * dp.size,
                max_tokens=self.config.evaluate.tokens,
                on_domain=begin,
                dp=dp,
            )
        except _StoppedError:
            return {}
        values: dict[str, Any] = {"step": self.trainer.step}
        for name, loss in losses.items():
            values[f"heldout_loss/{name}"] = loss.loss
            values[f"heldout_bits_per_byte/{name}"] = loss.bits_per_byte
        if metrics is not None:
            metrics.write(values)
        return losses

    def _content(self) -> CheckpointContent:
        return checkpoint_content(self.trainer, self.before, self.after)
