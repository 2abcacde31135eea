"""Workers: they tell each other, share work, fail together with one error, and one alone needs nobody."""

from contextlib import contextmanager

import pytest
import torch

from sigmoe.moe.storage.hashing import NoRoomError, WriteError
from sigmoe.moe.workers import ALONE


def test_work_is_spread_in_turn_and_comes_back_in_order(in_threads):
    did = {0: [], 1: [], 2: []}

    def work(workers):
        return workers.spread(lambda item: did[workers.rank].append(item) or item * item, range(7))

    assert in_threads(3, work) == [[0, 1, 4, 9, 16, 25, 36]] * 3
    assert did == {0: [0, 3, 6], 1: [1, 4], 2: [2, 5]}
    assert ALONE.spread(lambda item: -item, [1, 2]) == [-1, -2]


def test_vectors_come_in_the_order_of_the_ranks(in_threads):
    def work(workers):
        mine = [torch.full((workers.rank,), float(workers.rank))] * (workers.rank != 1)
        return [vector.tolist() for vector in workers.gather(mine)]

    assert in_threads(3, work) == [[[], [2.0, 2.0]]] * 3


@pytest.mark.parametrize("kind", [ValueError, OSError, WriteError, NoRoomError])
def test_what_one_raises_all_raise(in_threads, kind):
    def work(workers):
        with workers.together():
            if workers.rank >= 1:
                raise kind(f"no {workers.rank}")

    for error in in_threads(3, work):
        assert (type(error), str(error)) == (kind, "rank 1: no 1")


def test_rank_0_is_not_named_and_the_lowest_one_speaks(in_threads):
    def work(workers):
        with workers.together():
            raise ValueError(f"no {workers.rank}")

    assert [str(error) for error in in_threads(2, work)] == ["no 0", "no 0"]


def test_each_knows_the_error_that_all_raised(in_threads):
    def work(workers):
        with pytest.raises(OSError, match="rank 1: gone") as caught, workers.together():
            if workers.rank == 1:
                raise OSError("gone")
        return caught.value is workers.told

    assert in_threads(2, work) == [True, True]


def test_alone_an_error_stays_the_very_one():
    mine = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught, ALONE.together():
        raise mine
    assert caught.value is mine and ALONE.told is None


def test_the_first_makes_and_all_have_it(in_threads):
    made = []

    def work(workers):
        return workers.from_first(lambda: made.append(workers.rank) or {"a": 1})

    assert in_threads(2, work) == [{"a": 1}] * 2 and made == [0]

    def fail(workers):
        workers.from_first(lambda: pytest.fail("asked") if workers.rank else int("x"))

    assert [type(error) for error in in_threads(2, fail)] == [ValueError] * 2


@contextmanager
def held(log, fails_at=None):
    if fails_at == "begin":
        raise ValueError("cannot begin")
    log.append("begin")
    yield "thing"
    log.append("end")
    if fails_at == "end":
        raise ValueError("cannot end")


def test_the_first_holds_it_while_all_work(in_threads):
    log = []

    def work(workers):
        with workers.first_holds(held(log), len) as (own, told):
            workers.exchange(None)
            log.append("inside")
            workers.exchange(None)
        return own, told

    assert in_threads(2, work) == [("thing", 5), (None, 5)]
    assert log == ["begin", "inside", "inside", "end"]


@pytest.mark.parametrize(("fails_at", "log"), [("begin", []), ("end", ["begin", "inside", "inside", "end"])])
def test_entering_and_leaving_fail_together(in_threads, fails_at, log):
    seen = []

    def work(workers):
        with workers.first_holds(held(seen, fails_at), len):
            seen.append("inside")

    assert [str(error) for error in in_threads(2, work)] == [f"cannot {fails_at}"] * 2
    assert sorted(seen) == sorted(log)
