"""The watchdog: where no rank moves on any more, it says which one sits where, who waits for it, and ends them all.

A thread of every rank looks now and then whether the process has moved. Where one has stood still for the limit, all
answer how they stand, over a store and never by a collective operation. While any of them moves, nothing hangs: it is
loading, compiling or writing, and `parallel.timeout` bounds how long the rest may wait for it.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import distributed

from .launcher import Cluster, UnreachableError
from .motion import Motion
from .notice_board import Answer, NoticeBoard
from .stacks import dump_stacks, find_place

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
        self._talker: threading.Thread | None = None
        self._unheard, self._asked, self._lost = 0.0, False, 0
        self._still, self._last_beats, self._motion = 0.0, 0, Motion()
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
        watching = threading.Thread(target=self._watch, args=(self._cluster,), name="watchdog", daemon=True)
        self._begin_talk(self._cluster)
        watching.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in (watching, self._talker):
                assert thread is not None
                thread.join(_LAST_SECONDS)

    def _watch(self, cluster: Cluster) -> None:
        """Look whether the process moves, and the thread that talks: who serves the store may be what hangs."""
        renewed = False
        while not self._ended.wait(self._tick):
            self._look()
            self._unheard += self._tick
            silent = self._still > self._limit and self._unheard > self._patience
            if silent and not renewed:
                self._begin_talk(cluster)
            elif silent and self._unheard > 2 * self._patience:
                self._end(cluster, [None] * cluster.rank + [self._answer()], None)
            renewed = silent

    def _begin_talk(self, cluster: Cluster) -> None:
        """Talk over a new connection; a thread that waits at an old one, which was cut silently, is left there."""
        self._talker = threading.Thread(target=self._talk, args=(cluster,), name="watchdog", daemon=True)
        self._talker.start()

    def _talk(self, cluster: Cluster) -> None:
        """Ask and answer, over a new connection where one is lost."""
        while self._is_talker():
            try:
                self._converse(cluster, NoticeBoard(cluster, self._patience))
            except (distributed.DistError, UnreachableError) as error:
                self._unheard = 0.0  # who is out of reach may train on; what never answers raises nothing
                self._lost += 1
                if self._lost == 2:  # once may be the end of the run, where rank 0 has left
                    why = " ".join(str(error).split())
                    line = f"the watchdog of rank {cluster.rank} lost rank 0's store and tries again ({why:.120})"
                    with suppress(OSError):
                        os.write(2, f"\nsigmoe train: {line}\n".encode())
            self._ended.wait(self._tick)

    def _converse(self, cluster: Cluster, board: NoticeBoard) -> None:
        """Ask and answer. An operation of the store, at whose other end nothing moves, may take for ever."""
        while self._is_talker():
            stands = self._still > self._limit
            if stands != self._asked:
                # Where the connection breaks in between, one too many may ask, which costs little; never one too few.
                self._asked = self._asked and stands
                board.ask(stands)
                self._asked = stands
            if board.is_asked():
                board.answer(self._answer())
                # All could judge; at a thousand ranks the first one alone is kinder to the store.
                judges = stands and (cluster.rank == 0 or self._still > self._limit + self._patience)
                answers = board.verdict(board.judge() if judges else None)
                if answers is not None:
                    self._end(cluster, answers, board)
            self._unheard = 0.0
            self._ended.wait(self._tick)

    def _is_talker(self) -> bool:
        return self._talker is threading.current_thread() and not self._ended.is_set()

    def _look(self) -> None:
        moved = self._motion.look(self._tick) or self._beats != self._last_beats
        # Counted by looks, not by a clock: a process that was suspended has not stood still.
        self._still, self._last_beats = 0.0 if moved else self._still + self._tick, self._beats

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
