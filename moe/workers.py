"""The processes that share the work of a command: what they tell each other, and how they fail together."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor

from .storage.hashing import NoRoomError, WriteError

T = TypeVar("T")

_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (NoRoomError, WriteError, ValueError, OSError)
}  # a kind before what it is one of


class Workers:
    """This process, number `rank` of `size`, and the others: here none, a launcher's kind has them.

    Every method is called by all, in the same order. What is told is plain JSON data. All see the same disk.
    """

    rank: int = 0
    size: int = 1
    told: Exception | None = None  # what all raised together

    def exchange(self, data: Any) -> list[Any]:
        """Return everyone's `data`, by rank."""
        return [data]

    def gather(self, vectors: list[Tensor]) -> list[Tensor]:
        """Return everyone's float64 vectors, in the order of the ranks; not before all have called it."""
        return vectors

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block in which nobody waits for another; what it raises on one, all raise (the lowest rank's, named).

        Covers ValueError and OSError. One process alone runs the block as it is.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as caught:
            error = caught
        self.told = _first_error(self.exchange(None if error is None else [_kind(error), str(error)]))
        if self.told is not None:
            raise self.told from error

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make`, called by rank 0 alone, returns, or raise on all what it raises."""
        made: list[T] = []
        with self.together():
            if self.rank == 0:
                made.append(make())
        result: list[T] = self.exchange(made)[0]
        return result[0]

    def spread(self, work: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
        """Return what `work` returns of every item; each is one process's, in turn. What one raises, all raise."""
        with self.together():
            mine = [work(item) for item in items[self.rank :: self.size]]
        shares = self.exchange(mine)
        return [shares[place % self.size][place // self.size] for place in range(len(items))]

    @contextmanager
    def first_holds(
        self, context: AbstractContextManager[T], tell: Callable[[T], Any]
    ) -> Iterator[tuple[T | None, Any]]:
        """Enter `context` on rank 0 alone; yield what it yields there (None elsewhere), and on all what `tell` says.

        What entering or leaving it raises, all raise.
        """
        own: list[T] = []
        with ExitStack() as stack:

            def begin() -> Any:
                own.append(stack.enter_context(context))
                return tell(own[0])

            told = self.from_first(begin)
            yield own[0] if own else None, told
            with self.together():
                stack.close()


def _first_error(everyone: Sequence[list[str] | None]) -> Exception | None:
    """Return the lowest rank's error, that rank named unless it is 0."""
    for rank, told in enumerate(everyone):
        if told is not None:
            kind, text = told
            return _KINDS[kind](text if rank == 0 else f"rank {rank}: {text}")
    return None


def _kind(error: Exception) -> str:
    return next(name for name, kind in _KINDS.items() if isinstance(error, kind))


ALONE = Workers()
