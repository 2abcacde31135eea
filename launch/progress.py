"""The training line: loss, speed, share of the matmul peak, time left."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn

from .console import bar, notes
from .trainer import StepMetrics


class TrainProgress:
    """Draws one line while steps run; notes go above it. Without a terminal a line is printed now and then.

    A silent one, for ranks beyond the first, prints nothing.
    """

    def __init__(self, *, plain_every: int, silent: bool = False) -> None:
        self.console: Console = notes()
        self.silent = self.console.quiet = silent
        self.plain_every = plain_every
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @contextmanager
    def steps(self, step: int, steps: int) -> Iterator[None]:
        """Show the line from `step` to `steps`."""
        progress = bar(TextColumn("{task.fields[text]}"))
        self._task = progress.add_task("training", total=steps, completed=step, text="")
        if self.silent or not self.console.is_terminal:
            yield
            return
        with progress:
            self._bar = progress
            try:
                yield
            finally:
                self._bar = None

    def step(self, metrics: StepMetrics, speed: float, share: float) -> None:
        """Show a step: mean loss, tokens a second, share of the matmul peak."""
        text = f"loss {metrics.loss:.3f}  {speed:,.0f} tokens/s  {share:.0%} of peak"
        if metrics.skipped:
            self.note(f"step {metrics.step} skipped: loss or gradient is not finite")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=metrics.step, description="training", text=text)
        elif metrics.step % self.plain_every == 0:
            self.console.print(f"step {metrics.step}  {text}")

    def evaluating(self, domain: str) -> None:
        """Show that a domain's held-out text is being scored."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"evaluating {domain}")

    def urgent(self, text: str) -> None:
        """Print a line past the console: for signal handlers, which may have interrupted its writing to stderr."""
        if self.silent:
            return
        line = f"\n{text}\n" if self.console.is_terminal else f"{text}\n"
        with suppress(OSError):  # nobody listens any more
            os.write(2, line.encode())

    def note(self, text: str) -> None:
        """Print a line above the progress."""
        (self._bar.console if self._bar is not None else self.console).print(text)
