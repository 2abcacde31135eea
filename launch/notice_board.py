"""Where the watchdogs of a run ask and answer each other: a store of their own, apart from all collectives."""

import json
import time
from dataclasses import asdict, dataclass

from torch.distributed.distributed_c10d import PrefixStore

from .launcher import Cluster
from .rendezvous import open_store

# To connect; the store is there when a run begins, and who lost it tries again.
_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How a rank stands: still or not, what it does, and where it is (see `stacks.Place`)."""

    stands: bool
    doing: str
    collective: str | None
    line: str


@dataclass
class _Seen:
    """The number of a rank's newest answer when it was asked, and now; and since when that is known."""

    first: int
    newest: int
    since: float


class NoticeBoard:
    """One rank's view of it. Who has not answered for `patience` seconds, though somebody asks, never will.

    Everything raises DistError where the store is gone.
    """

    def __init__(self, cluster: Cluster, patience: float) -> None:
        self.rank, self.size, self.patience = cluster.rank, cluster.size, patience
        self._store = PrefixStore("watchdog", open_store(cluster, _SECONDS))
        self._number = 0
        self._seen: dict[int, _Seen] = {}

    def ask(self, wanted: bool) -> None:
        """Let everyone answer from now on, or no longer for this rank's sake."""
        self._store.add("askers", 1 if wanted else -1)
        self._seen = {}

    def is_asked(self) -> bool:
        """Return whether anybody asks."""
        return bool(self._store.add("askers", 0))

    def answer(self, answer: Answer) -> None:
        """Say how this rank stands."""
        self._number += 1
        self._store.set(f"answer/{self.rank}", json.dumps([self._number, asdict(answer)]))

    def judge(self) -> list[Answer | None] | None:
        """Return how all stand, None for who does not answer; or None where one moves, or may still answer."""
        now, answers = time.monotonic(), list[Answer | None]()
        for rank in range(self.size):
            number, answer = self._newest(rank)
            seen = self._seen.setdefault(rank, _Seen(number, number, now))
            if number != seen.newest:
                seen.newest, seen.since = number, now
            if now - seen.since > self.patience:
                answer = None
            elif answer is None or seen.newest == seen.first or not answer.stands:
                return None
            answers.append(answer)
        return answers

    def verdict(self, answers: list[Answer | None] | None) -> list[Answer | None] | None:
        """Return what the first rank to judge found, or None; `answers` are what this one has found, if anything."""
        if answers is not None:
            told = json.dumps([None if answer is None else asdict(answer) for answer in answers])
            self._store.compare_set("verdict", "", told)
        if not self._store.check(["verdict"]):
            return None
        return [None if answer is None else Answer(**answer) for answer in json.loads(self._store.get("verdict"))]

    def leave(self, expected: int, seconds: float) -> None:
        """Return when so many ranks have come here, or after so long: a launcher ends all as soon as one is gone."""
        deadline = time.monotonic() + seconds
        self._store.add("left", 1)
        while self._store.add("left", 0) < expected and time.monotonic() < deadline:
            time.sleep(0.05)

    def _newest(self, rank: int) -> tuple[int, Answer | None]:
        key = f"answer/{rank}"
        if not self._store.check([key]):
            return 0, None
        number, answer = json.loads(self._store.get(key))
        return number, Answer(**answer)
