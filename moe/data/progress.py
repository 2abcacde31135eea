"""How long-running work tells whoever watches how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Called with a stage's name, what is done of it and of how much (None: unknown). A stage may start only once."""

    def __call__(self, stage: str, done: int, total: int | None, /) -> None:
        """Take note."""


def no_progress(stage: str, done: int, total: int | None, /) -> None:
    """Take no note."""
