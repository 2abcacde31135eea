"""A process that measures one contender's generation: as `train_worker`, a request and then numbers of runs."""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..moe.parsing import from_mapping
from .generate_run import GenerateShape, Texts, build_run


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
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    request = from_mapping(GenerateRequest, json.loads(sys.stdin.readline()))
    torch.set_num_threads(request.threads)
    run, count = build_run(request.contender, request.shape), request.warmup
    while True:
        print(json.dumps(dataclasses.asdict(_round(run, count))), file=answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        count = int(line)


def _round(run: Callable[[], Texts], count: int) -> GenerateAnswer:
    seconds: list[float] = []
    texts: Texts = []
    for _ in range(count):
        begin = time.perf_counter()
        texts = run()
        seconds.append(time.perf_counter() - begin)
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return GenerateAnswer(seconds=tuple(seconds), texts=tuple(map(tuple, texts)), peak_bytes=peak)


if __name__ == "__main__":
    main()
