"""Runs the programs of this folder, each of which forks one child a point, and hands over what they print.

At the end of a session one table says what was tried and survived: see `survived`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_KEY = "survived"


@pytest.fixture
def survived(record_property):
    """Tell the table at the end how many points of a row were tried and how many survived. Before it is asserted.

    Rows of the same name are added up.
    """

    def tell(row, tried, survived):
        record_property(_KEY, [row, tried, survived])

    return tell


def pytest_terminal_summary(terminalreporter):
    """Print the table. Reports bring their properties from other processes too."""
    rows = {}
    for report in [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]:
        if report.when == "call":
            for row, tried, survived in (value for key, value in report.user_properties if key == _KEY):
                before = rows.get(row, (0, 0))
                rows[row] = before[0] + tried, before[1] + survived
    if not rows:
        return
    width = max(map(len, rows))
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'injected':{width}}  tried  survived")
    for row, (tried, survived) in sorted(rows.items()):
        terminalreporter.write_line(f"{row:{width}}  {tried:5}  {survived:8}")


@pytest.fixture(scope="session")
def memory_folder():
    """A folder in memory where there is one: a kill loses nothing that was written, and fsync costs nothing."""
    shm = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def run_program():
    """Run a program of this folder; returns its JSON."""

    def run(name, *arguments):
        command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    return run
