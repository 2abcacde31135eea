"""What a run must refuse before it costs anything, and what it must survive."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
from rich.console import Console

from sigmoe.launch.compose import compose_command
from sigmoe.launch.console import notes, print_table
from sigmoe.launch.main import main
from sigmoe.launch.metrics import Metrics
from sigmoe.launch.progress import TrainProgress
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.storage.hashing import hash_file

REFUSED = {
    "phases=[{train: ['*', 'model.nothing.*']}]": "phases[0].train=['model.nothing.*']: no parameter would train",
    "phases=[{until: 4}, {train: ['*.experts.9.*']}]": "phases[1].train=['*.experts.9.*']: no parameter would train",
    "phases=[{train: []}]": "phases[0].train=[]: no parameter would train",
    "model.dim=80000000": "parameters needs at least 614,401,",
    "router.sets={recipes: [0, 3000000000], ships: 2}": "expert 1 belongs to no domain",
    "schedule={name: wsd, warmup_steps: 6, decay_steps: 5}": "decay_steps 5 do not fit into 10 steps",
}


def rows(path):
    """Return the objects of a metrics file; NaN and Infinity, which Python would take, are no JSON."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_in_one_line_with_nothing_written(train, tmp_path, capfd, mistake):
    assert train("out=run", mistake) == 2
    told = capfd.readouterr().err
    assert REFUSED[mistake] in told
    assert told.count("\n") == 1, told
    assert not list(tmp_path.iterdir())


def test_warmup_and_decay_may_fill_the_run(train, tmp_path):
    assert train("out=run", "schedule={name: wsd, warmup_steps: 6, decay_steps: 4}", "stop_at=1") == 0
    assert (tmp_path / "run/checkpoints/step-00000001").is_dir()


def test_no_run_begins_inside_a_checkpoint(train, tmp_path, capfd):
    assert train("out=run", "stop_at=1") == 0
    before = sorted(tmp_path.rglob("*"))
    for inside in ("", "/model", "/new", "/new/deep"):
        capfd.readouterr()
        assert train(f"out=run/checkpoints/step-00000001{inside}", "stop_at=1") == 2
        told = capfd.readouterr().err
        assert "lies in a checkpoint: give the run's own directory, or another out=" in told
        assert told.count("\n") == 1, told
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["verify", "checkpoint=run/checkpoints/step-00000001"]) == 0


def test_a_manifest_of_another_kind_is_no_checkpoint(train, tmp_path):
    """A web page's or a browser extension's manifest.json may lie above the runs."""
    (tmp_path / "manifest.json").write_text("{}")
    assert train("out=run", "stop_at=1") == 0


def test_a_run_goes_on_with_its_own_data_alone(train, dataset, tmp_path, capfd):
    """The same tokenizer, sizes and domains; one token differs, and what vouches for it agrees."""
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    tokens = np.memmap(other / "ships.train.bin", dtype=np.uint16, mode="r+")
    tokens[0] += 1
    tokens.flush()
    manifest = json.loads((other / "dataset.json").read_text())
    (ships,) = (entry for entry in manifest["domains"] if entry["name"] == "ships")
    ships["splits"]["train"]["files"]["ships.train.bin"]["sha256"] = hash_file(other / "ships.train.bin").sha256
    (other / "dataset.json").write_text(json.dumps(manifest))
    open_dataset(other).verify()

    assert train("out=run", "stop_at=1") == 0
    capfd.readouterr()
    assert train("out=run", f"dataset={other}") == 2
    assert f"it was trained on other data than {other} holds now" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000001"]
    shutil.copytree(dataset, tmp_path / "moved")
    assert train("out=run", f"dataset={tmp_path}/moved", "stop_at=2") == 0


BROKEN = {
    "steps: [1,": "expected the node content",
    "a: b: c": "mapping values are not allowed here",
    "\tsteps: 1": "cannot start any token",
    "steps: '1": "found unexpected end of stream",
    "steps: *other": "found undefined alias",
    "steps: 1\nsteps: 2": "found duplicate key steps",
    "- 1": "Cannot merge DictConfig with ListConfig",
    "7": "Invalid loaded object type: int",
    "steps: ${seed": "no viable alternative at input",
    "steps: !!int ''": "index out of range",
    "[" * 2000: "recursion",
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:16])
def test_broken_yaml_of_the_users_is_one_line(tmp_path, capfd, text):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/bad.yaml").write_text(f"# @package _global_\n{text}\n")
    words = ["experiment=bad", "dataset=x", f"out={tmp_path}/run", "--config-dir", str(tmp_path / "mine")]
    assert main(["train", *words]) == 2
    told = capfd.readouterr().err
    assert BROKEN[text] in told
    assert told.count("\n") == 1, told
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "name", ["a, b", "it's", 'say "hi"', "[a]", "{a: b}", "a=b", "${seed}", "back\\slash", "both\\'", "end\\"]
)
def test_config_dir_may_have_any_name(tmp_path, name):
    (tmp_path / name / "experiment").mkdir(parents=True)
    (tmp_path / name / "experiment/mine.yaml").write_text("# @package _global_\nsteps: 7\n")
    config = compose_command("train", ["experiment=mine", "dataset=x", "out=y"], str(tmp_path / name))
    assert config["steps"] == 7


def test_what_json_lacks_becomes_null(tmp_path):
    metrics = Metrics(tmp_path, pytest.fail, tensorboard=False, resumed_step=-1)
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "z_loss": -math.inf, "lr": 0.5, "skipped": True})
    metrics.close()
    expected = {"step": 1, "loss": None, "grad_norm": None, "z_loss": None, "lr": 0.5, "skipped": True}
    assert rows(tmp_path / "metrics.jsonl") == [expected]


def test_a_diverged_run_writes_json(train, tmp_path):
    """The first update throws the weights out of fp32's range; every step after it is skipped."""
    assert train("out=run", "optim.lr=1e38", "schedule.warmup_steps=0", "steps=3") == 0
    logged = [row for row in rows(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert [(row["loss"], row["skipped"]) for row in logged[1:]] == [(None, True)] * 2


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 1, "lo', b"\xff\xfe\0\0", b"\0" * 64, b"5", b"[1]", b"{}", b'{"step": null}', b'{"step": Infinity}'],
    ids=repr,
)
def test_a_garbage_last_line_is_dropped(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n' + tail)
    metrics = Metrics(tmp_path, pytest.fail, tensorboard=False, resumed_step=2)
    metrics.write({"step": 3, "loss": 1.0})
    metrics.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_a_garbage_last_line_does_not_block_a_resume(train, tmp_path):
    assert train("out=run", "stop_at=2") == 0
    with (tmp_path / "run/metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "loss\xff\0')
    assert train("out=run", "stop_at=4") == 0
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]


PATHS = ["runs/[ab]/x", "runs/[bold]x[/bold]", "runs/[/]", "runs/:fire:/x"]


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_printed_whole(capfd, path):
    notes().print(f"run directory {path}")
    TrainProgress(plain_every=1).note(f"resuming {path}")
    print_table(path, ["domain", f"source {path}"], [["ships", f"{path}/*.txt"]], left=2)
    told = capfd.readouterr()
    assert told.err == f"run directory {path}\nresuming {path}\n"
    assert told.out.splitlines()[0].strip() == path
    assert f"source {path} " in told.out
    assert f" {path}/*.txt " in told.out


def test_sigterm_in_the_last_evaluation_loses_nothing(train, tmp_path, capfd, monkeypatch):
    evaluating, heard = TrainProgress.evaluating, []

    def terminated(progress, domain):
        heard.append(domain)
        if len(heard) == 3:  # both domains before the first step, then the first one after the last
            os.kill(os.getpid(), signal.SIGTERM)
        evaluating(progress, domain)

    def unheard(number, frame):
        raise AssertionError("the run does not handle SIGTERM here")

    monkeypatch.setattr(TrainProgress, "evaluating", terminated)
    before = signal.signal(signal.SIGTERM, unheard)
    try:
        assert train("out=run") == 0
        assert signal.getsignal(signal.SIGTERM) is unheard
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["recipes", "ships", "recipes"]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000010\n"
    assert train("out=run") == 0
    assert heard[3:] == ["recipes", "ships"]
    assert "heldout_loss/ships" in rows(tmp_path / "run/metrics.jsonl")[-1]
    capfd.readouterr()
    assert train("out=run") == 0
    assert "stands at step 10 already" in capfd.readouterr().err and len(heard) == 5


def test_tables_drop_columns_but_never_cut_a_figure(capsys, monkeypatch):
    monkeypatch.setattr(
        "sigmoe.launch.console.results", lambda: Console(width=40, force_terminal=True, color_system=None)
    )
    columns, row = ["domain", "loss", "perplexity", "epochs"], ["recipes", "7.804 → 4.696", "2,451 → 109.6", "0.05"]
    print_table("t", columns, [row], expendable=("perplexity", "epochs"))
    narrow = capsys.readouterr().out
    assert "7.804 → 4.696" in narrow
    assert "perplexity" not in narrow
    print_table("t", columns, [row])
    assert "2,451 → 109.6" in capsys.readouterr().out


def test_a_finished_run_prints_its_table_again(train, capfd):
    assert train("out=run") == 0
    first = capfd.readouterr().out
    assert train("out=run") == 0
    assert capfd.readouterr().out == first
