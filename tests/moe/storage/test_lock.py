"""A lock file: one holder, named to the others, free when its process ends."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from sigmoe.moe.storage.durable import is_leftover
from sigmoe.moe.storage.lock import LOCK, held

HOLD = """
import sys, time
from pathlib import Path
from sigmoe.moe.storage.lock import held
with held(Path(sys.argv[1]), patience=0, tell=print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_holder_is_named_and_a_kill_frees(tmp_path, holder):
    said = []
    with (
        pytest.raises(ValueError, match=f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}"),
        held(tmp_path, patience=0, tell=said.append),
    ):
        pass
    assert said == []
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with held(tmp_path, patience=0, tell=said.append):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert said == []
    assert not any(tmp_path.iterdir())


def test_who_waits_gets_it(tmp_path, holder):
    said = []

    def tell(line):
        said.append(line)
        threading.Timer(0.1, holder.kill).start()

    with held(tmp_path, patience=60, tell=tell):
        assert holder.wait() == -signal.SIGKILL
    assert said == [
        f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}: waiting up to 60 s",
    ]


def test_a_lock_file_that_was_deleted_is_no_lock(tmp_path, monkeypatch):
    """Its holder deletes it between our open and our lock: we must hold the file that lies there, not the old one."""
    real, calls = fcntl.flock, []

    def flock(descriptor, operation):
        real(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path, patience=0, tell=print):
        assert len(calls) == 2
        assert os.path.samestat((tmp_path / LOCK).stat(), os.fstat(calls[1]))


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with held(tmp_path, patience=0, tell=said.append):
        assert "has no locks" in said[0]
    assert not any(tmp_path.iterdir())


def test_no_link_is_followed(tmp_path):
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="writing failed"), held(tmp_path, patience=0, tell=print):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_what_a_kill_leaves_makes_no_run_of_a_folder():
    assert is_leftover(LOCK)
