"""Runs the programs of this folder, each of which forks one child a point, and hands over what they print."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


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
