"""torchrun --max-restarts: after kill -9 of a rank all are started again, and go on from the last complete step."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None or find_spec("megatron") is None, reason="needs deepspeed and megatron-core"
)


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_torchrun_starts_killed_ranks_again(train, tiny, tmp_path, survived):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    words = [*tiny, "steps=8", "save.every=2", "out=run"]
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name("restart.py")), *words],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert train("steps=8", "save.every=2", "out=whole") == 0
    resumed = done.returncode == 0 and "resuming run at step " in done.stderr
    alike = resumed and losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    began = sorted(path.name for path in tmp_path.glob("began-*"))
    twice = began == ["began-0-0", "began-0-1", "began-1-0", "began-1-1"]
    taken = sorted(int(line) for path in tmp_path.glob("samples-1-*") for line in path.read_text().split())
    # Behind a complete step: that of step 4 was being saved, or stood.
    each_once = taken in (list(range(2 * 4, 8 * 4)), list(range(4 * 4, 8 * 4)))
    survived("kill -9 of a rank in mid-step, started again by torchrun", 1, int(alike and twice and each_once))
    assert alike and twice and each_once, (began, taken, done.stderr)
