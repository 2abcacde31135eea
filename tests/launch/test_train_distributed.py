"""`sigmoe train` under torchrun: the same result as one process, one voice, one end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from sigmoe.moe.storage.checkpoint import open_checkpoint

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None or find_spec("megatron") is None, reason="needs deepspeed and megatron-core"
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
NOISE = re.compile(r"[EWI][0-9]{4} .*torch/distributed/elastic")


class Run:
    """A launched command; its words go through a pipe."""

    def __init__(self, folder, ranks, *words, program=("-m", "sigmoe.launch.train")):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [*TORCHRUN, str(ranks), *program, *words]
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **pipe)
        self.told = []

    def until(self, text):
        """Read stderr up to the line that begins so."""
        for line in self.process.stderr:
            self.told.append(line)
            if line.startswith(text):
                return
        raise AssertionError("".join(self.told))

    def rank(self, number):
        """The process id of a rank."""
        pattern = f"RANK={number}".encode()
        for entry in Path("/proc").iterdir():
            try:
                stat, environment = (entry / "stat").read_text(), (entry / "environ").read_bytes()
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            if parent == self.process.pid and pattern in environment.split(b"\0"):
                return int(entry.name)
        raise AssertionError(f"no rank {number}")

    def end(self):
        """Wait; return exit code, stdout, and the lines of stderr that are not torchrun's own."""
        out, err = self.process.communicate(timeout=200)
        lines = "".join([*self.told, err]).splitlines()
        return self.process.returncode, out, [line for line in lines if not NOISE.match(line)]


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [row["loss"] for row in rows(run) if "loss" in row]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """A run of two ranks that stopped after step 5; the folder, and what it told."""
    folder = tmp_path_factory.mktemp("two")
    code, out, err = Run(folder, 2, *tiny, "stop_at=5", "parallel.zero_stage=2", "micro_batch=1", "out=run").end()
    assert code == 0, "\n".join(err)
    return folder / "run", out, err


@pytest.fixture
def whole(train, tmp_path):
    """One process, from the beginning to the end."""
    assert train("out=whole") == 0
    return tmp_path / "whole"


def test_two_ranks_speak_once(two):
    run, out, err = two
    assert names(run) == ["checkpoints", "config.yaml", "metrics.jsonl"]
    assert names(run / "checkpoints") == ["latest", "step-00000005"]
    assert [line.split("  ")[0] for line in err if line.startswith("step ")] == [f"step {n}" for n in range(1, 6)]
    assert sum("2 ranks, cpu" in line for line in err) == 1
    (line,) = [line for line in err if line.startswith("a rank holds ")]
    assert re.search(
        r"MB of parameters, .+ MB of optimizer state, in host memory [0-9.]+ MB while it is saved in mid-run; "
        r"with rows routed evenly it sends a step dp [0-9.]+ MB, edp",
        line,
    ), line
    assert [line for line in err if "arn" in line] == []
    assert [row["step"] for row in rows(run) if "loss" in row] == [1, 2, 3, 4, 5]
    open_checkpoint(run / "checkpoints/step-00000005").verify()
    assert out == ""


def test_two_ranks_see_what_one_process_sees(two, whole):
    for theirs, ours in zip(rows(two[0]), rows(whole)):
        for key in set(ours) - {"tokens_per_second", "flops_share"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4), key


def test_one_process_goes_on_where_two_stopped(two, whole, train, tmp_path):
    subprocess.run(["cp", "-r", str(two[0]), str(tmp_path / "run")], check=True)
    assert train("out=run") == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-4)


def test_four_ranks_go_on_where_one_process_stopped(tiny, whole, train, tmp_path):
    assert train("out=run", "stop_at=5") == 0
    code, out, err = Run(tmp_path, 4, *tiny, "parallel.tp=2", "parallel.ep=2", "out=run").end()
    assert code == 0, "\n".join(err)
    assert "resuming run at step 5" in err
    assert "recipes" in out
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-4)
    ours, theirs = (
        {key: value for key, value in rows(run)[-1].items() if key.startswith("heldout")}
        for run in (tmp_path / "run", whole)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len(ours) == 4


LONG = ["steps=5000", "save.every=2", "save.keep=2", "evaluate.tokens=64"]


def test_a_killed_rank_ends_all_and_costs_little(tiny, train, tmp_path):
    run = Run(tmp_path, 2, *tiny, *LONG, "parallel.ep=2", "out=run")
    run.until("step 5 ")
    begin = time.monotonic()
    os.kill(run.rank(1), signal.SIGKILL)
    code, _, err = run.end()
    assert code != 0
    assert time.monotonic() - begin < 100
    assert sum(line.startswith("sigmoe train: another process is gone") for line in err) <= 1
    assert "".join(err).count("Traceback") == 1, "\n".join(err)  # torchrun's own report
    saved = [name for name in names(tmp_path / "run/checkpoints") if name.startswith("step-")]
    step = int(saved[-1].removeprefix("step-"))
    assert step >= 2  # that of step 4 may still have been under way
    assert train(*LONG, f"stop_at={step + 2}", "out=run") == 0
    assert names(tmp_path / "run/checkpoints")[-1] == f"step-{step + 2:08}"
    assert not [name for name in names(tmp_path / "run/checkpoints") if name.startswith(".")]


def test_a_signal_to_any_rank_stops_all_after_the_same_step(tiny, train, tmp_path):
    run = Run(tmp_path, 2, *tiny, *LONG, "parallel.tp=2", "out=run")
    run.until("step 3 ")
    os.kill(run.rank(1), signal.SIGTERM)
    code, _, err = run.end()
    assert code == 0, "\n".join(err)
    (line,) = [line for line in err if line.startswith("stopped at step ")]
    step = int(line.split()[3].rstrip(","))
    assert rows(tmp_path / "run")[-1]["step"] == step
    assert names(tmp_path / "run/checkpoints")[-1] == f"step-{step:08}"
    assert train(*LONG, f"stop_at={step + 1}", "out=run") == 0


def test_a_bad_layout_is_one_line_and_nothing_is_written(tiny, tmp_path):
    code, out, err = Run(tmp_path, 2, *tiny, "parallel.tp=2", "parallel.ep=4", "out=run").end()
    assert code != 0
    assert (out, list(tmp_path.iterdir())) == ("", [])
    (line,) = [line for line in err if line.startswith("sigmoe train: ")]
    assert "parallel.ep=4 with etp=2 must divide the 2 process(es)" in line
    # torchrun's report: every rank ended by itself, with 2.
    assert [line.split()[2] for line in err if line.strip().startswith("exitcode")] == ["2", "2"]


def test_a_mistake_of_one_rank_names_it(tiny, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom sigmoe.launch.main import main\n"
        "sys.exit(main(['train', *sys.argv[1:], *(['dataset=nowhere'] if os.environ['RANK'] == '1' else [])]))\n"
    )
    code, _, err = Run(tmp_path, 2, *tiny, "out=run", program=(str(program),)).end()
    assert code != 0
    (line,) = [line for line in err if line.startswith("sigmoe train: ")]
    assert line.startswith("sigmoe train: rank 1: ")
    assert "nowhere" in line
    assert names(tmp_path) == ["program.py"]


def test_other_commands_refuse_a_launcher(tmp_path):
    code, _, err = Run(tmp_path, 2, "checkpoint=x", program=("-m", "sigmoe.launch.verify")).end()
    assert code != 0
    (line,) = [line for line in err if line.startswith("sigmoe verify: ")]
    assert "torchrun started 2 processes, this command runs in one: start it without the launcher" in line


def test_too_large_a_model_is_refused_by_formula(tiny, tmp_path):
    """Parameters alone would fill more than any machine: nothing is allocated on the way to knowing it."""
    size = ["model.dim=8000000", "parallel.tp=2"]
    code, _, err = Run(tmp_path, 2, *tiny, *size, "out=run").end()
    assert code != 0
    (line,) = [line for line in err if line.startswith("sigmoe train: ")]
    assert re.search(r"a model of [0-9,]+ parameters needs at least [0-9,.]+ GB on this machine to train", line)
    assert list(tmp_path.iterdir()) == []
