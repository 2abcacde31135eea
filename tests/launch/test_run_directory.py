"""One run at a time in a run directory."""

import threading
import time

from sigmoe.moe.storage.lock import LOCK, held


def test_two_runs_do_not_share_a_directory(train, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    with held(run, patience=0, tell=print):
        assert train("out=run", "parallel.join_timeout=1") == 2
        told = capsys.readouterr().err
        assert "run is in use by process" in told.splitlines()[-1]
        assert "wait for it or stop it" in told.splitlines()[-1]
        assert "waiting up to 1 s" in told
        assert [path.name for path in run.iterdir()] == [LOCK]


def test_a_run_waits_for_the_one_before_and_goes_on_from_it(train, tmp_path, capsys):
    assert train("out=run", "stop_at=1") == 0
    release = threading.Event()

    def hold():
        with held(tmp_path / "run", patience=0, tell=print):
            release.set()
            time.sleep(0.5)

    other = threading.Thread(target=hold)
    other.start()
    release.wait()
    assert train("out=run", "steps=2") == 0
    other.join()
    told = capsys.readouterr().err
    assert told.index("waiting up to 120 s") < told.index("resuming run at step 1")
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_mistake_leaves_no_directory(train, tmp_path):
    (tmp_path / "weights").mkdir()
    assert train("out=deep/run", "initial=weights") == 2
    assert not (tmp_path / "deep" / "run").exists()
