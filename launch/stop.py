"""Requests to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's --signal) set a flag that the session looks at."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# A launcher passes Ctrl-C on to ranks whom the terminal has told already: that is no second one.
_ECHO_SECONDS = 5.0


class StopRequest:
    """Whether this process was asked to stop; `several` ranks are told by their launcher as well.

    `say` prints a line, past what the signal may have interrupted.
    """

    def __init__(self, *, several: bool) -> None:
        self.asked = False
        self.say: Callable[[str], None] = lambda line: None
        self._several, self._since = several, 0.0
        self._echo_seconds = _ECHO_SECONDS if several else 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn SIGTERM and SIGUSR1 into a request, and SIGINT where there are several ranks: none must go alone.

        With several ranks it stays so: a launcher may tell them again while they leave.
        """
        with self._caught(signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if self._several else [])):
            yield

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Turn SIGINT into a request too, now that there is something to save; a second one ends the process."""
        with self._caught(signal.SIGINT):
            yield

    @contextmanager
    def _caught(self, *numbers: signal.Signals) -> Iterator[None]:
        before = {number: signal.signal(number, self._ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items() if not self._several else ():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
            self.say("stopping after this step; press Ctrl-C again to stop without saving")
        elif number == signal.SIGINT and time.monotonic() - self._since >= self._echo_seconds:
            raise KeyboardInterrupt
