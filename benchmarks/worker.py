"""A measuring process, from both ends: one starts it and asks, the other answers.

Requests come on its stdin, answers go to the stdout it was given, one JSON a line. The first request describes the
work; its answer comes when the warm-up is done. Each further request is a number of steps. The process ends with its
stdin.
"""

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import IO, Any, ClassVar, Generic, Protocol, TypeVar

import torch

from ..moe.parsing import from_mapping

AnswerT = TypeVar("AnswerT")


class Answer(Protocol):
    """A dataclass of what was measured."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Request(Protocol):
    """A dataclass that describes the work."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def contender(self) -> str:
        """Who is measured."""
        ...

    @property
    def threads(self) -> int:
        """Of torch."""
        ...

    @property
    def warmup(self) -> int:
        """Steps before the first answer."""
        ...


RequestT = TypeVar("RequestT", bound=Request)


class Worker(Generic[AnswerT]):
    """A process that measures one contender, warmed up when construction returns; a context manager that ends it.

    It runs `module` of this folder, which answers `request`, and every number that follows, with an `answer`. Without
    `wait` the first answer is still to be received: of several processes that need each other.
    """

    def __init__(
        self,
        module: str,
        request: Request,
        answer: type[AnswerT],
        *,
        wait: bool = True,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name, self.answer = request.contender, answer
        self.complaints = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed by _end
        pipe = subprocess.PIPE
        self.process = start_module(
            f"benchmarks.{module}", stdin=pipe, stdout=pipe, stderr=self.complaints, environment=environment
        )
        try:
            self.send(json.dumps(dataclasses.asdict(request)))
            if wait:
                self.receive()
        except BaseException:
            self._end(kill=True)
            raise

    def run(self, steps: int) -> AnswerT:
        """Let it take `steps` steps."""
        self.send(str(steps))
        return self.receive()

    def send(self, line: str) -> None:
        """Ask for something; `receive` returns the answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: then there is no answer either
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def receive(self) -> AnswerT:
        """Wait for an answer. Raises OSError with the last line that the process wrote where it has ended."""
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            self.complaints.seek(0)
            reason = self.complaints.read().strip().splitlines() or [f"exit code {self.process.returncode}"]
            raise OSError(f"measuring {self.name} failed: {reason[-1]}")
        return from_mapping(self.answer, json.loads(answer))

    def __enter__(self) -> "Worker[AnswerT]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kill=kind is not None)

    def _end(self, *, kill: bool) -> None:
        if kill:
            self.process.kill()
        self.process.communicate()
        self.complaints.close()


def start_module(
    module: str,
    *arguments: str,
    stdin: int | None = None,
    stdout: int,
    stderr: IO[str],
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[str]:
    """Start a module of sigmoe as a process, with `environment` beside our own; stdin None: it shares ours."""
    added = ["env", *(f"{name}={value}" for name, value in environment.items())] if environment else []
    # -P and another folder keep the package root off sys.path, where our `kernels` would shadow Hugging Face's.
    command = [*added, sys.executable, "-P", "-W", "ignore", "-m", f"sigmoe.{module}", *arguments]
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, text=True, cwd=tempfile.gettempdir())


def serve(request_type: type[RequestT], prepare: Callable[[RequestT], Callable[[int], Answer]]) -> None:
    """Be the process that a `Worker` started: `prepare` makes of its request what takes a number of steps."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    request = from_mapping(request_type, json.loads(sys.stdin.readline()))
    torch.set_num_threads(request.threads)
    take, line = prepare(request), str(request.warmup)
    while line:
        print(json.dumps(dataclasses.asdict(take(int(line)))), file=answers, flush=True)
        line = sys.stdin.readline()


def peak_bytes() -> int:
    """Return the most memory that this process ever held."""
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
