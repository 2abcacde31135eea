"""The watchdog: where no rank moves on any more, it says which one sits where, who waits for it, and ends them all.

A thread of every rank looks now and then whether the main thread has moved. Where one has stood still for the limit,
all answer how they stand, over a store and never by a collective operation. While any of them moves, nothing hangs: it
is loading, compiling or writing, and `parallel.timeout` bounds how long the rest may wait for it.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import distributed

from .launcher import Cluster
from .notice_board import Answer, NoticeBoard
from .stacks import dump_stacks, find_place, motion

# sysexits.h, EX_TEMPFAIL: nothing is wrong with what was asked for, try again.
EXIT_CODE = 75
# How long a rank that knows of the hang waits until the others have written their stacks.
_LAST_SECONDS = 5.0
_MOST_LISTED = 8
# What the store may take at the most.
_STORE_SECONDS = 3.0


class Watchdog:
    """Watches this rank, if `limit` (seconds) is not 0. Without a `cluster` nobody waits for another: it does nothing.

    `directory` is where stacks are written when it exists; until then they go to stderr.
    """

    def __init__(self, cluster: Cluster | None, limit: float) -> None:
        self.directory: Path | None = None
        self._cluster, self._limit = cluster, limit
        self._tick = min(max(limit / 20, 0.1), 5.0)
        self._patience = 2 * self._tick + _STORE_SECONDS  # with one who is asked, and does not answer
        self._doing, self._beats = "starting", 0
        self._unheard = 0.0
        self._still, self._last = 0.0, (0, motion())
        self._ended = threading.Event()

    def tell(self, doing: str) -> None:
        """Say what is done from now on. That is a move."""
        self._doing, self._beats = doing, self._beats + 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs."""
        if self._cluster is None or not self._limit:
            yield
            return
        threads = [
            threading.Thread(target=task, args=(self._cluster,), name="watchdog", daemon=True)
            for task in (self._watch, self._talk)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(_LAST_SECONDS)

    def _watch(self, cluster: Cluster) -> None:
        """Look whether the main thread moves, and the other one of these: who serves the store may be what hangs."""
        while not self._ended.wait(self._tick):
            self._look()
            self._unheard += self._tick
            if self._still > self._limit and self._unheard > self._patience:
                self._end(cluster, [None] * cluster.rank + [self._answer()], None)

    def _talk(self, cluster: Cluster) -> None:
        """Ask and answer. An operation of the store, at whose other end nothing moves, may take for ever."""
        with suppress(distributed.DistError, ValueError):  # gone, as rank 0 is when all is over
            board, asked = NoticeBoard(cluster, self._patience), False
            while not self._ended.wait(self._tick):
                stands = self._still > self._limit
                if stands != asked:
                    board.ask(stands)
                    asked = stands
                if board.is_asked():
                    board.answer(self._answer())
                    # All could judge; at a thousand ranks the first one alone is kinder to the store.
                    judges = stands and (cluster.rank == 0 or self._still > self._limit + self._patience)
                    answers = board.verdict(board.judge() if judges else None)
                    if answers is not None:
                        self._end(cluster, answers, board)
                self._unheard = 0.0

    def _look(self) -> None:
        now = self._beats, motion()
        # Counted by looks, not by a clock: a process that was suspended has not stood still.
        self._still = 0.0 if now != self._last else self._still + self._tick
        self._last = now

    def _answer(self) -> Answer:
        place, stands = find_place(), self._still > self._limit
        return Answer(stands=stands, doing=self._doing, collective=place.collective, line=place.line)

    def _end(self, cluster: Cluster, answers: list[Answer | None], board: NoticeBoard | None) -> None:
        """Write the stacks, say what is known if no lower rank can, and end the process: its main thread cannot."""
        there = [rank for rank, answer in enumerate(answers) if answer is not None]
        folder = self.directory if self.directory is not None and self.directory.is_dir() else None
        with suppress(OSError):
            dump_stacks(None if folder is None else folder / f"stacks-rank{cluster.rank}.txt")
        if cluster.rank == there[0] and (board is not None or cluster.rank <= 1):
            stacks = "the stacks are above" if folder is None else f"stacks in {folder}/stacks-rank*.txt"
            line = f"no rank has moved for {self._limit:g} s: {describe(answers)}; {stacks}; run again to go on"
            with suppress(OSError):
                os.write(2, f"\nsigmoe train: {line} from the newest checkpoint\n".encode())
        if board is not None:
            with suppress(distributed.DistError):
                board.leave(len(there), _LAST_SECONDS)
        os._exit(EXIT_CODE)


def describe(answers: list[Answer | None]) -> str:
    """Say who does not answer, who sits where, and who waits for them in which collective operation."""
    told: dict[tuple[int, str], list[int]] = {}
    for rank, answer in enumerate(answers):
        told.setdefault(_described(answer), []).append(rank)
    return "; ".join(f"{_ranks(told[key])} {key[1]}" for key in sorted(told))


def _described(answer: Answer | None) -> tuple[int, str]:
    """Return what to say of a rank, and its place: who does not wait for others is to blame, and comes first."""
    if answer is None:
        return 0, "does not answer"
    if answer.collective is None:
        return 1, f"({answer.doing}) sits at {answer.line}"
    return 2, f"({answer.doing}) waits in {answer.collective}, {answer.line}"


def _ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:_MOST_LISTED]))
    more = len(ranks) - _MOST_LISTED
    return f"rank {listed}" + (f" and {more} more" if more > 0 else "")
