"""The terminal: one console on stderr for progress and notes, results on stdout.

No markup: what is printed are names and paths of the user's, in which `[ab]` is no tag and `:fire:` no picture.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from ..moe.data.progress import Progress as Sink

_SILENCE = 10.0  # seconds


def notes() -> Console:
    """Return the console for progress and notes (stderr)."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def results() -> Console:
    """Return the console for results (stdout); wide enough for tables where it is not a terminal."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    return console


def bar(*columns: ProgressColumn, transient: bool = False, bytes: bool = False) -> Progress:
    """Return a progress bar with a description, a count, and what `columns` add; a transient one leaves no trace.

    What is counted may be `bytes`, and then their rate is shown.
    """
    console = notes()
    counts = (DownloadColumn(), TransferSpeedColumn()) if bytes else (MofNCompleteColumn(),)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        *counts,
        *columns,
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
        transient=transient,
        disable=not console.is_terminal,
    )


@contextmanager
def progress_sink(*, transient: bool = False, bytes: bool = False) -> Iterator[Sink]:
    """Yield a callback that draws one bar a stage; transient ones vanish at the end."""
    with bar(transient=transient, bytes=bytes) as progress:
        tasks: dict[str, TaskID] = {}

        told = time.monotonic()

        def update(stage: str, done: int, total: int | None, /) -> None:
            nonlocal told
            if progress.disable and time.monotonic() - told > _SILENCE:  # into a file: a line now and then
                told = time.monotonic()
                notes().print(f"{stage}: {done:,}" + (f" of {total:,}" if total else ""))
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield update


def print_table(
    title: str, columns: list[str], rows: list[list[str]], *, left: int = 1, expendable: tuple[str, ...] = ()
) -> None:
    """Print a table to stdout, figures never cut: where it is too wide, columns go in the order of `expendable`."""
    console, dropped = results(), list(expendable)
    kept = list(range(len(columns)))
    while True:
        shown = _table(title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows], left)
        width = Measurement.get(console, console.options.update(width=10_000), shown).maximum
        if width <= console.width or not dropped:
            break
        gone = dropped.pop(0)
        kept = [i for i in kept if columns[i] != gone]
    console.width = max(console.width, width)
    console.print(shown)


def _table(title: str, columns: list[str], rows: list[list[str]], left: int) -> Table:
    """Return a table whose first `left` columns are text and the rest right-aligned figures."""
    out = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        out.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        out.add_row(*row)
    return out
