"""The same short run under every launcher, by the package's own scripts: one process's losses, one directory and voice.

Two "nodes" are two processes of the launcher on this machine, or, where it permits, two network namespaces.
"""

import os
import re
import signal
from importlib.util import find_spec
from shutil import which

import pytest
from launched import deepspeed_without_ssh, environment, losses, mpirun, mpirun_here, slurm, torchrun, wait_for
from nodes import Nodes, why_not

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None or find_spec("megatron") is None, reason="needs deepspeed and megatron-core"
)
needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or which("mpirun", path=environment()["PATH"]) is None, reason="needs mpi4py and mpirun"
)


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
    check(tmp_path, alone, "srun", [slurm(tmp_path, *tiny, "out=run")], hosts=1)
    assert not (tmp_path / "requeued").exists()


def test_slurms_script_saves_and_requeues_when_time_is_up(tiny, tmp_path):
    job = slurm(tmp_path, *tiny, "steps=5000", "evaluate.tokens=64", "out=run")
    wait_for(job, "step 3 ")
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == 0, job.words[-3000:]
    assert "stopped at step " in job.words
    assert (tmp_path / "requeued").read_text() == "requeue 4242\n"
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


def test_deepspeeds_script_with_a_hostfile_and_without_ssh(tiny, tmp_path, alone):
    check(tmp_path, alone, "deepspeed", deepspeed_without_ssh(tmp_path, *tiny, "out=run"), hosts=1)


@needs_mpi
@pytest.mark.skipif(
    why_not() is None and os.environ.get("SIGMOE_FAULTS") != "all",
    reason="two nodes, which this machine permits, say more",
)
def test_mpiruns_script(tiny, tmp_path, alone):
    check(tmp_path, alone, "mpirun", [mpirun_here(tmp_path, *tiny, "out=run")], hosts=1)


@needs_mpi
def test_mpiruns_script_saves_when_it_is_told_to_end(tiny, tmp_path):
    """mpirun by itself would kill its ranks."""
    job = mpirun_here(tmp_path, *tiny, "steps=5000", "evaluate.tokens=64", "out=run")
    wait_for(job, "step 3 ")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.words[-3000:]
    assert "stopped at step " in job.words
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


def test_torchruns_script_over_two_nodes(tiny, tmp_path, alone, nodes):
    jobs = [torchrun(nodes, node, tmp_path, *tiny, "out=run") for node in range(2)]
    check(tmp_path, alone, "torchrun", jobs, hosts=2)


@needs_mpi
def test_mpiruns_script_over_two_nodes(tiny, tmp_path, alone, nodes):
    check(tmp_path, alone, "mpirun", [mpirun(nodes, tmp_path, *tiny, "out=run")], hosts=2)
