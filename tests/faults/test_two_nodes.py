"""A node killed, or its cable pulled, in the middle of a run over two network namespaces: the other ends with one line.

What was saved goes on. `make faults` tries every way; `make test` one.
"""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))

from launched import mpirun, torchrun, wait_for
from nodes import Nodes, why_not

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None or find_spec("megatron") is None or find_spec("mpi4py") is None,
    reason="needs deepspeed, megatron-core and mpi4py",
)
LONG = ["steps=5000", "save.every=2", "save.keep=2", "evaluate.tokens=64"]
PATIENCE = ["parallel.timeout=8", "parallel.watchdog=0"]
LIMIT = 90  # seconds: the patience of a save, then a wait for rank 0's word, then the launcher's own end
LOST = ("A daemon failed", "will terminate the job")  # mpirun of a node
WAYS = [
    ("torchrun", "cut off"),
    ("torchrun", "node 1 killed"),
    ("torchrun", "node 0 killed"),
    ("mpirun", "cut off"),
    ("mpirun", "node 1 killed"),
]
EVERYTHING = os.environ.get("SIGMOE_FAULTS") == "all"


@pytest.fixture
def nodes():
    """Two namespaces, of this test alone: it leaves them broken."""
    why = why_not()
    if why is not None:
        pytest.skip(why)
    with Nodes() as two:
        yield two


@pytest.mark.parametrize(("launcher", "way"), WAYS if EVERYTHING else WAYS[:1])
def test_the_other_node_ends_with_one_line(nodes, tiny, train, tmp_path, survived, launcher, way):
    words = [*tiny, *LONG, *PATIENCE, "out=run"]
    if launcher == "mpirun":
        jobs = [mpirun(nodes, tmp_path, *words)]
    else:
        jobs = [torchrun(nodes, node, tmp_path, *words) for node in range(2)]
    wait_for(jobs[0], "step 5 ")
    if way == "cut off":
        nodes.cut_off()
        left = jobs
    else:
        dead = int(way.split()[1])
        nodes.kill(dead)
        left = [job for node, job in enumerate(jobs) if node != dead or launcher == "mpirun"]
    codes = [job.end(LIMIT) for job in left]
    told = [[line for line in job.own_words if "another process is gone or does not answer" in line] for job in left]
    # Where mpirun loses a whole node, it kills the other's ranks, maybe before they speak, and the script ends with 1.
    fewest = 0 if (launcher, way) == ("mpirun", "node 1 killed") else 1
    well = all(fewest <= len(lines) <= 1 and lines == job.own_words for lines, job in zip(told, left))
    well = well and all(codes) and (launcher != "mpirun" or any(text in jobs[0].words for text in LOST))
    step = max(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step-*"))
    well = well and train(*LONG, f"stop_at={step + 2}", "out=run") == 0
    survived(f"{launcher} over two nodes, {way}", 1, int(well))
    assert well, (codes, told, [job.words[-2000:] for job in left])


@pytest.mark.skipif(not EVERYTHING, reason="make faults")
def test_torchrun_starts_all_nodes_again(nodes, tiny, tmp_path, survived):
    words = [*tiny, "steps=100", "save.every=2", "save.keep=2", "evaluate.tokens=64", "out=run"]
    jobs = [torchrun(nodes, node, tmp_path, *words, RESTARTS="1") for node in range(2)]
    wait_for(jobs[0], "step 5 ")
    nodes.kill(1, rank=1)
    codes = [job.end() for job in jobs]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    each_once = [row["step"] for row in rows if "loss" in row] == list(range(1, 101))
    well = codes == [0, 0] and each_once and "resuming run at step " in jobs[0].words
    survived("torchrun over two nodes, a rank killed, all started again", 1, int(well))
    assert well, (codes, [job.words[-3000:] for job in jobs])
