"""The same short run under every launcher, by the package's own scripts: one process's losses, one directory and voice.

Two "nodes" are two processes of the launcher on this machine, or, where it permits, two network namespaces.
"""

import os
import re
import signal
from importlib.util import find_spec
from shutil import which

import pytest
from launched import SCRIPTS, Started, environment, free_port, losses, mpirun, torchrun, wait_for
from nodes import Nodes, why_not

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None or find_spec("megatron") is None, reason="needs deepspeed and megatron-core"
)
needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or which("mpirun", path=environment()["PATH"]) is None, reason="needs mpi4py and mpirun"
)
MPIRUN = "--allow-run-as-root --oversubscribe"
SLURM_JOB = {
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "2",
    "SLURM_TASKS_PER_NODE": "1,1",
    "SLURM_JOB_NODELIST": "localhost,other",
    "SLURM_PROCID": "0",  # a batch job's shell has these too
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.fixture(scope="module")
def nodes():
    """Two namespaces."""
    why = why_not()
    if why is not None:
        pytest.skip(why)
    with Nodes() as two:
        yield two


@pytest.fixture
def alone(train, tmp_path):
    """The losses of one process."""
    assert train("out=alone") == 0
    return losses(tmp_path / "alone")


def check(folder, alone, launcher, jobs, *, hosts):
    """All jobs ended well; together they made one run, spoke once, and it is one process's run."""
    for job in jobs:
        assert job.end() == 0, job.words[-3000:]
    words = [line for job in jobs for line in job.words.splitlines()]
    assert sum(line.startswith(f"{launcher} started 2 ranks on {hosts} host") for line in words) == 1, "\n".join(words)
    assert len([line for line in words if re.match(r"  \S+: ranks? [0-9-]+$", line)]) == hosts
    assert [line.split("  ")[0] for line in words if line.startswith("step ") and "loss" in line] == [
        f"step {step}" for step in range(1, 11)
    ]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["alone", "run"]
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl"]
    assert losses(folder / "run") == pytest.approx(alone, abs=1e-4)


def test_slurms_script(tiny, tmp_path, alone):
    job = Started(tmp_path, [str(SCRIPTS / "slurm.sh"), *tiny, "out=run"], **SLURM_JOB)
    check(tmp_path, alone, "srun", [job], hosts=1)
    assert not (tmp_path / "requeued").exists()


def test_slurms_script_saves_and_requeues_when_time_is_up(tiny, tmp_path):
    words = [*tiny, "steps=5000", "evaluate.tokens=64", "out=run"]
    job = Started(tmp_path, [str(SCRIPTS / "slurm.sh"), *words], **SLURM_JOB)
    wait_for(job, "step 3 ")
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == 0, job.words[-3000:]
    assert "stopped at step " in job.words
    assert (tmp_path / "requeued").read_text() == "requeue 4242\n"
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


def test_deepspeeds_script_with_a_hostfile_and_without_ssh(tiny, tmp_path, alone):
    (tmp_path / "hostfile").write_text("first slots=1\nsecond slots=1\n")
    settings = {"HOSTFILE": "hostfile", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    jobs = [
        Started(tmp_path, [str(SCRIPTS / "deepspeed.sh"), *tiny, "out=run"], NODE_RANK=str(node), **settings)
        for node in range(2)
    ]
    check(tmp_path, alone, "deepspeed", jobs, hosts=1)


@needs_mpi
@pytest.mark.skipif(
    why_not() is None and os.environ.get("SIGMOE_FAULTS") != "all",
    reason="two nodes, which this machine permits, say more",
)
def test_mpiruns_script(tiny, tmp_path, alone):
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    job = Started(tmp_path, [str(SCRIPTS / "mpirun.sh"), *tiny, "out=run"], HOSTFILE="hostfile", MPIRUN=MPIRUN)
    check(tmp_path, alone, "mpirun", [job], hosts=1)


def test_torchruns_script_over_two_nodes(tiny, tmp_path, alone, nodes):
    jobs = [torchrun(nodes, node, tmp_path, *tiny, "out=run") for node in range(2)]
    check(tmp_path, alone, "torchrun", jobs, hosts=2)


@needs_mpi
def test_mpiruns_script_over_two_nodes(tiny, tmp_path, alone, nodes):
    check(tmp_path, alone, "mpirun", [mpirun(nodes, tmp_path, *tiny, "out=run")], hosts=2)
