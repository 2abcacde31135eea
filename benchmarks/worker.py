"""Starts and asks a measuring process."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from ..moe.parsing import from_mapping

AnswerT = TypeVar("AnswerT")


class Request(Protocol):
    """A dataclass that describes the work."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def contender(self) -> str:
        """Who is measured."""
        ...


class Worker(Generic[AnswerT]):
    """A process that measures one contender, warmed up when construction returns; a context manager that ends it.

    It runs `module` of this folder, which answers `request`, and every number that follows, with an `answer`.
    """

    def __init__(self, module: str, request: Request, answer: type[AnswerT]) -> None:
        self.name, self.answer = request.contender, answer
        # -P and another folder keep the package root off sys.path, where our `kernels` would shadow Hugging Face's.
        self.complaints = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed by _end
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", f"sigmoe.benchmarks.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
            cwd=tempfile.gettempdir(),
        )
        try:
            self._ask(json.dumps(dataclasses.asdict(request)))
        except BaseException:
            self._end(kill=True)
            raise

    def run(self, steps: int) -> AnswerT:
        """Let it take `steps` steps."""
        return self._ask(str(steps))

    def _ask(self, line: str) -> AnswerT:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: then there is no answer either
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
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
