"""`sigmoe train -m key=a,b out=DIR`: one run a point, one after the other, each a process in its own folder."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from .compose import compose_command, quoted_override, sweep_points
from .console import notes, print_table


def sweep(command: str, overrides: list[str], config_dir: str | None) -> int:
    """Run all points, whatever becomes of one; return 0, the first exit code that is another, or 130 where some lack.

    Every point is composed before the first one runs: a mistake is a ValueError with nothing started.
    """
    if command != "train":
        raise ValueError(f"-m starts several runs of train: give the keys of {command} one value")
    fixed, points = sweep_points(command, overrides)
    if not points:
        raise ValueError("-m needs a key with several values: key=a,b or key=range(first,beyond)")
    configs = [compose_command(command, [*fixed, *point], config_dir) for point in points]
    if len({config["out"] for config in configs}) > 1:
        raise ValueError("-m: give out= one value; every run gets a folder in it, named after its own values")
    out = Path(configs[0]["out"])
    names = [re.sub(r"[^\w.=,+-]", "_", ",".join(point)) for point in points]
    if len(set(names)) < len(names):
        raise ValueError("-m: two runs would have the same folder: give every value once")
    folder = [] if config_dir is None else ["--config-dir", config_dir]
    codes = list[int]()
    with _Child() as child:
        for name, point in zip(names, points):
            if child.stopped:
                break
            notes().print(f"run {len(codes) + 1} of {len(points)}: {name}")
            codes.append(child.run([command, *folder, *fixed, *point, quoted_override("out", str(out / name))]))
    rows = [[name, _end(code), _loss(out.expanduser() / name)] for name, code in zip(names, codes)]
    rows += [[name, "not started", ""] for name in names[len(codes) :]]
    print_table(f"{len(points)} runs in {out}", ["run", "ended", "loss"], rows, left=2)
    return next((code if code > 0 else 1 for code in codes if code), 130 if len(codes) < len(points) else 0)


class _Child:
    """Runs one process after the other; SIGINT and SIGTERM go to the one that runs, which saves, and are the last."""

    def __init__(self) -> None:
        self.stopped = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Child":
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, words: list[str]) -> int:
        """Return the exit code, or minus the signal that ended it."""
        # A session of its own: else Ctrl-C would reach it from the terminal and from us, and the second costs the save.
        self._process = subprocess.Popen([sys.executable, "-m", "sigmoe.launch.main", *words], start_new_session=True)
        return self._process.wait()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(number)


def _end(code: int) -> str:
    return "well" if code == 0 else f"exit code {code}" if code > 0 else signal.Signals(-code).name


def _loss(run: Path) -> str:
    """Return the last training loss that a run logged."""
    path = run / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    losses = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
    return f"{losses[-1]:.4f}" if losses else ""
