"""The scripts' own part: what they refuse, and mpirun's code 0, which does not always mean that the run has ended."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from sigmoe.launch import main, mpi
from sigmoe.launch.launcher import Cluster

SCRIPTS = Path(main.__file__).parent / "scripts"
SETTINGS = {"NODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "HOSTFILE": "hostfile"}


def start(folder, script, **changes):
    """Run a script in `folder`, whose bin/ comes first."""
    (folder / "hostfile").touch()
    path = f"{folder}/bin:{os.environ['PATH']}"
    environment = {"PATH": path} | SETTINGS | changes
    command = ["bash", str(SCRIPTS / script)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("script", ["deepspeed.sh", "mpirun.sh", "slurm.sh", "torchrun.sh"])
def test_a_missing_environment_is_one_line(tmp_path, script):
    done = start(tmp_path, script, VENV="nowhere")
    assert done.returncode == 2
    assert done.stderr == "no virtual environment nowhere here: make one, or give VENV=its folder\n"


@pytest.mark.parametrize(
    ("does", "code", "lines"),
    [
        ('rm "$SIGMOE_RUNNING"', 0, 0),
        ("exit 0", 1, 1),  # as where a node is gone
        ("exit 137", 137, 0),
        ('trap "rm $SIGMOE_RUNNING; exit 5" USR1; sleep 0.1; kill -TERM $PPID; sleep 0.3; exit 9', 5, 0),
    ],
)
def test_mpiruns_0_counts_only_if_rank_0_has_reported_the_end(tmp_path, does, code, lines):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").touch()
    (tmp_path / "bin/mpirun").write_text(f"#!/bin/bash\n{does}\n")
    (tmp_path / "bin/mpirun").chmod(0o755)
    done = start(tmp_path, "mpirun.sh", VENV=str(tmp_path))
    assert (done.returncode, done.stderr.count("did not report the run's end")) == (code, lines), done.stderr
    assert not list(tmp_path.glob(".sigmoe-running-*"))


def test_what_mpi_refuses_is_one_line_and_ends_the_job(monkeypatch, capfd):
    class RefusedError(RuntimeError):
        """As of nodes that share a host name."""

    def refuse(_):
        raise RefusedError("MPI_ERR_TRUNCATE: message truncated")

    codes = []
    world = SimpleNamespace(Abort=codes.append, Split_type=refuse)
    MPI = SimpleNamespace(Exception=RefusedError, COMM_TYPE_SHARED=0, COMM_WORLD=world)
    monkeypatch.setattr(mpi, "load_mpi", lambda *_: MPI)
    with pytest.raises(RefusedError):  # the true Abort does not return
        mpi.agree(Cluster(launcher="mpirun", rank=1, size=2, local_rank=0, local_size=1))
    told = capfd.readouterr().err
    assert codes == [2] and told.count("\n") == 1
    assert "MPI_ERR_TRUNCATE" in told and "host name of its own" in told
