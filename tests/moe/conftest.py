"""Workers that are threads of this process."""

import threading

import pytest

from sigmoe.moe.workers import Workers

WAIT = 60  # seconds


class Threads(Workers):
    """Number `rank` of several threads; what each tells lies in `slots` while all read it."""

    def __init__(self, rank, slots, barrier):
        self.rank, self.size, self._slots, self._barrier = rank, len(slots), slots, barrier

    def exchange(self, data):
        self._slots[self.rank] = data
        self._barrier.wait(WAIT)
        everyone = list(self._slots)
        self._barrier.wait(WAIT)
        return everyone

    def gather(self, vectors):
        return [vector for some in self.exchange(vectors) for vector in some]


@pytest.fixture
def in_threads():
    """Call `work` with the workers of as many threads; returns what each returned, or raised, by rank."""

    def run(size, work):
        slots, barrier, results = [None] * size, threading.Barrier(size), [None] * size

        def call(rank):
            try:
                results[rank] = work(Threads(rank, slots, barrier))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * WAIT)
        return results

    return run
