"""Starts `sigmoe train` by the scripts that the package brings, each node one process that is waited for."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from nodes import ADDRESSES

from sigmoe.launch import main

SCRIPTS = Path(main.__file__).parent / "scripts"
SLURM = Path(__file__).parent.parent / "launch" / "slurm"  # srun and scontrol that stand for Slurm's
SLURM_JOB = {
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "2",
    "SLURM_TASKS_PER_NODE": "1,1",
    "SLURM_JOB_NODELIST": "localhost,other",
    "SLURM_PROCID": "0",  # a batch job's shell has these too
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI", "SLURM_", "TORCHELASTIC_")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**changes):
    """This process's environment as a fresh shell has it, with python where the scripts look for it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    path = f"{SLURM}:{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {"VENV": sys.prefix, "OMP_NUM_THREADS": "1", "PATH": path} | changes


class Started:
    """One command of a job; what it says goes to a file."""

    def __init__(self, folder, command, **changes):
        self.path = folder / f"words-{free_port()}"
        with self.path.open("w") as words:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment(**changes), stdout=words, stderr=words, stdin=subprocess.DEVNULL
            )

    @property
    def words(self):
        return self.path.read_text(errors="replace")

    @property
    def own_words(self):
        """The lines that say how the command failed."""
        return [line for line in self.words.splitlines() if line.startswith("sigmoe train: ")]

    def end(self, seconds=120):
        """The exit code; killed after so many seconds."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            raise AssertionError(self.words[-3000:]) from error


def losses(run):
    """The loss of every step that a run logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def slurm(folder, *words):
    """Start the script as a batch job's shell does."""
    return Started(folder, [str(SCRIPTS / "slurm.sh"), *words], **SLURM_JOB)


def deepspeed_without_ssh(folder, *words):
    """Start the script twice, as on two nodes."""
    (folder / "hostfile").write_text("first slots=1\nsecond slots=1\n")
    settings = {"HOSTFILE": "hostfile", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        Started(folder, [str(SCRIPTS / "deepspeed.sh"), *words], NODE_RANK=str(node), **settings) for node in (0, 1)
    ]


def mpirun_here(folder, *words):
    """Start the script for this machine alone."""
    (folder / "hostfile").write_text("localhost slots=2\n")
    settings = {"HOSTFILE": "hostfile", "MPIRUN": "--allow-run-as-root --oversubscribe"}
    return Started(folder, [str(SCRIPTS / "mpirun.sh"), *words], **settings)


def torchrun(nodes, node, folder, *words, **changes):
    """Start the script on a node."""
    settings = {"NODES": "2", "PROCESSES": "1", "NODE_RANK": str(node), "MASTER_ADDR": ADDRESSES[0]}
    return Started(folder, nodes.command(node, str(SCRIPTS / "torchrun.sh"), *words), **settings, **changes)


def mpirun(nodes, folder, *words):
    """Start the script on node 0, which starts the other by an agent in ssh's place."""
    nodes.write_agent(folder / "agent")
    (folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    settings = {"HOSTFILE": "hostfile", "MPIRUN": f"--allow-run-as-root --prtemca plm_ssh_agent {folder}/agent"}
    return Started(folder, nodes.command(0, str(SCRIPTS / "mpirun.sh"), *words), **settings)


def wait_for(job, start):
    """Return when the job has said a line that begins so."""
    while not any(line.startswith(start) for line in job.words.splitlines()):
        assert job.process.poll() is None, job.words[-3000:]
        time.sleep(0.1)
