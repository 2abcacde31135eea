"""What it takes for a move: looked at from one thread while the main one waits in one place, as the watchdog does."""

import _thread
import threading
import time
import zlib

import pytest

from sigmoe.launch import motion
from sigmoe.launch.motion import Motion

LOOKS = 10
SECONDS = 0.05


@pytest.fixture(autouse=True)
def no_other_thread_moves(monkeypatch):
    """What the runner of the tests does beside is not meant."""
    others = {thread.ident for thread in threading.enumerate()} - {threading.main_thread().ident}
    monkeypatch.setattr(motion.threading, "enumerate", lambda: _but(others))


_enumerate = threading.enumerate


def _but(others):
    threads = _enumerate()
    return [thread for thread in threads if thread.ident not in others] + [Chore(ident) for ident in others]


class Chore:
    """A thread that does not count."""

    daemon, name = True, "chore"

    def __init__(self, ident):
        self.ident = ident


def moves():
    """How many of LOOKS looks see a move, while the main thread waits here."""
    seen = []

    def look():
        watched = Motion()
        for _ in range(LOOKS):
            time.sleep(SECONDS)
            seen.append(watched.look(SECONDS))

    watching = threading.Thread(target=look, daemon=True)
    watching.start()
    watching.join()
    return sum(seen[1:])  # the main thread may not have arrived at the first


def spin(go_on):
    while go_on:
        time.sleep(SECONDS / 3)
        time.sleep(SECONDS)


def test_who_waits_does_not_move():
    assert moves() == 0


@pytest.mark.parametrize("start", ["pool", "save", "autograd"])
def test_any_thread_moves_the_process(start):
    """Also one that Python's threading did not start, as autograd's."""
    go_on, ended = [True], threading.Event()

    def work():
        spin(go_on)
        ended.set()

    if start == "autograd":
        _thread.start_new_thread(work, ())
    else:
        threading.Thread(target=work, name=f"{start} 4", daemon=start == "save").start()
    moved = moves()
    go_on.clear()
    ended.wait()
    assert moved > 0


def test_a_chore_does_not():
    go_on = [True]
    chore = threading.Thread(target=spin, args=(go_on,), daemon=True)
    chore.start()
    moved = moves()
    go_on.clear()
    chore.join()
    assert moved == 0


@pytest.mark.parametrize(("on_gpu", "expected"), [(False, True), (True, False)])
def test_a_long_call_moves_the_process_by_its_cpu_time(monkeypatch, on_gpu, expected):
    """Where CUDA is in use, who waits spins."""
    monkeypatch.setattr(motion.torch.cuda, "is_initialized", lambda: on_gpu)
    data, done = bytes(1 << 29), threading.Event()

    def compress():  # one call, without the lock of Python
        zlib.compress(data, 9)
        done.set()

    working = threading.Thread(target=compress, daemon=True)  # its place does not count; its CPU does
    working.start()
    moved = moves()
    assert not done.is_set()
    working.join()
    assert (moved > 0) == expected


def test_bytes_from_a_disk_are_a_move(monkeypatch):
    told = iter(range(1000))
    monkeypatch.setattr(motion, "_disk_bytes", lambda: (str(next(told)),))
    assert moves() == LOOKS - 1
