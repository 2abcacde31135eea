"""The quickstart, shortened, under every launcher on two ranks: one process's losses, one directory, one voice.

`make launchers` runs it and ends with a table; `make test` does the same with a smaller model (test_launchers.py).
"""

import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from launched import Started, deepspeed_without_ssh, mpirun, mpirun_here, slurm, torchrun
from nodes import Nodes, why_not

from sigmoe.launch import main

if os.environ.get("SIGMOE_LAUNCHERS") != "all":
    pytest.skip("minutes: make launchers", allow_module_level=True)
if any(find_spec(name) is None for name in ("deepspeed", "megatron", "mpi4py")):
    pytest.skip("needs deepspeed, megatron-core and mpi4py", allow_module_level=True)

DATASET = Path(main.__file__).parent.parent / "data/six"
STEPS = 30
QUICKSTART = ["experiment=quickstart", f"dataset={DATASET}", "out=run", f"steps={STEPS}", "schedule.warmup_steps=10"]
QUICKSTART += ["evaluate.tokens=4096", "save.every=10"]
TRAIN = ["-m", "sigmoe.launch.train"]
DEEPSPEED = ["deepspeed", "--num_gpus", "2"]
TOLERANCE = 1e-4

# Name: what starts the jobs in a folder. Those over two nodes take the nodes too.
ON_ONE = {
    "torchrun --standalone": lambda at, words: [
        Started(at, ["torchrun", "--standalone", "--nproc-per-node=2", *TRAIN, *words])
    ],
    "deepspeed": lambda at, words: [Started(at, [*DEEPSPEED, "--module", TRAIN[1], *words])],
    "deepspeed --no_local_rank": lambda at, words: [
        Started(at, [*DEEPSPEED, "--no_local_rank", "--module", TRAIN[1], *words])
    ],
    "deepspeed.sh, hostfile, no ssh": lambda at, words: deepspeed_without_ssh(at, *words),
    "mpirun.sh": lambda at, words: [mpirun_here(at, *words)],
    "slurm.sh, srun's environment": lambda at, words: [slurm(at, *words)],
}
ON_TWO = {
    "torchrun.sh, two nodes": lambda at, words, nodes: [torchrun(nodes, node, at, *words) for node in (0, 1)],
    "mpirun.sh, two nodes": lambda at, words, nodes: [mpirun(nodes, at, *words)],
}


@pytest.fixture(scope="module")
def table(request):
    """Rows that are printed when all is done."""
    rows = [("started by", f"loss of step {STEPS}", "difference", "directories", "progress lines")]
    yield rows
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\nthe quickstart under every launcher, two ranks")
        for row in rows:
            print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip())


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    """Start jobs, wait for them, and write what they made into the table; returns that."""

    def ended(name, start, alone):
        folder = tmp_path_factory.mktemp("launched")
        jobs = start(folder)
        for job in jobs:
            assert job.end(500) == 0, job.words[-3000:]
        made = found(folder, jobs)
        far = difference(made, alone or made)
        lines = f"{len(made['progress'])} of {STEPS // 10}"
        table.append((name, f"{made['loss']:.6f}", f"{far:.1e}", str(len(made["directories"])), lines))
        return made, far

    return ended


@pytest.fixture(scope="module")
def alone(run):
    """What one process makes."""
    if not DATASET.is_dir():
        pytest.skip(f"needs {DATASET}: make launchers prepares it")
    command = [sys.executable, *TRAIN, *QUICKSTART]
    return run("one process", lambda folder: [Started(folder, command)], None)[0]


@pytest.fixture(scope="module")
def nodes():
    """Two namespaces."""
    why = why_not()
    if why is not None:
        pytest.skip(why)
    with Nodes() as two:
        yield two


def found(folder, jobs):
    """What jobs left in a folder, and said."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    words = [line for job in jobs for line in job.words.splitlines()]
    return {
        "loss": next(row["loss"] for row in reversed(rows) if "loss" in row),
        "heldout": {key: value for key, value in rows[-1].items() if key.startswith("heldout_loss/")},
        "directories": [path.name for path in folder.iterdir() if path.is_dir()],
        "events": len(list((folder / "run/tensorboard").iterdir())),
        "steps": sorted(path.name for path in (folder / "run/checkpoints").iterdir()),
        "progress": [line.split("  ")[0] for line in words if re.match(r"step \d+  loss ", line)],
        "maps": [line for line in words if " started 2 ranks on " in line],
    }


def difference(made, alone):
    """The largest between final losses: of the last step, and of each domain's held-out text."""
    assert made["heldout"].keys() == alone["heldout"].keys() and len(made["heldout"]) == 6
    return max(
        abs(made["loss"] - alone["loss"]),
        *(abs(made["heldout"][key] - alone["heldout"][key]) for key in made["heldout"]),
    )


def check(made, far, alone, name, hosts):
    """One run, told once, and it is one process's."""
    assert far <= TOLERANCE
    assert made["directories"] == ["run"]
    assert made["events"] == 1
    assert made["steps"] == alone["steps"] == ["latest", *(f"step-{step:08}" for step in range(10, STEPS + 1, 10))]
    assert made["progress"] == alone["progress"] == [f"step {step}" for step in range(10, STEPS + 1, 10)]
    launcher = "srun" if "srun" in name else re.match(r"\w+", name)[0]
    assert [line.startswith(f"{launcher} started 2 ranks on {hosts} host") for line in made["maps"]] == [True]


@pytest.mark.parametrize("name", ON_ONE)
def test_two_processes_of_a_launcher(run, alone, name):
    check(*run(name, lambda folder: ON_ONE[name](folder, QUICKSTART), alone), alone, name, 1)


@pytest.mark.parametrize("name", ON_TWO)
def test_two_nodes(run, alone, nodes, name):
    check(*run(name, lambda folder: ON_TWO[name](folder, QUICKSTART, nodes), alone), alone, name, 2)
