"""A process that measures one contender's generation; a step is a run."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from .generate_run import GenerateShape, Texts, build_run
from .worker import peak_bytes, serve


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What a worker measures."""

    contender: str
    shape: GenerateShape
    threads: int
    warmup: int  # runs


@dataclass(frozen=True, kw_only=True)
class GenerateAnswer:
    """One round: seconds a run, the tokens of its last one, the most bytes this process ever held."""

    seconds: tuple[float, ...]
    texts: tuple[tuple[int, ...], ...]
    peak_bytes: int


def main() -> None:
    """Serve requests until stdin ends."""
    serve(GenerateRequest, _prepare)


def _prepare(request: GenerateRequest) -> Callable[[int], GenerateAnswer]:
    run = build_run(request.contender, request.shape)
    return lambda count: _round(run, count)


def _round(run: Callable[[], Texts], count: int) -> GenerateAnswer:
    seconds: list[float] = []
    texts: Texts = []
    for _ in range(count):
        begin = time.perf_counter()
        texts = run()
        seconds.append(time.perf_counter() - begin)
    return GenerateAnswer(seconds=tuple(seconds), texts=tuple(map(tuple, texts)), peak_bytes=peak_bytes())


if __name__ == "__main__":
    main()
