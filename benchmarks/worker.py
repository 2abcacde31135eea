"""Starts and asks a measuring process."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from types import TracebackType

from ..moe.parsing import from_mapping
from .train_worker import WorkerAnswer, WorkerRequest


class Worker:
    """A process that measures one contender, warmed up when construction returns; a context manager that ends it."""

    def __init__(self, request: WorkerRequest) -> None:
        self.name = request.contender
        # -P and another folder keep the package root off sys.path, where our `kernels` would shadow Hugging Face's.
        self.complaints = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed by _end
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "sigmoe.benchmarks.train_worker"],
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

    def run(self, steps: int) -> WorkerAnswer:
        """Let it take `steps` steps."""
        return self._ask(str(steps))

    def _ask(self, line: str) -> WorkerAnswer:
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
        return from_mapping(WorkerAnswer, json.loads(answer))

    def __enter__(self) -> "Worker":
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
