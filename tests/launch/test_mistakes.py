"""A user's mistake is one line and exit code 2, and nothing is written."""

import random
import subprocess
import sys

import numpy as np
import pytest

from sigmoe.launch.compose import compose_command
from sigmoe.launch.main import main
from sigmoe.launch.train_config import TrainConfig

MISTAKES = {
    "modl.dim=3": "unknown key modl.dim; did you mean model.dim",
    "+colour=3": "unknown key colour",
    "dataset=null": "dataset",
    "steps=many": "steps must be a whole number, got 'many'",
    "steps=1.5": "steps must be a whole number",
    "steps=0": "steps must be at least 1",
    "optim.lr=fast": "optim.lr must be a number",
    "model.tie_embeddings=1": "model.tie_embeddings must be true or false",
    "precision=fp8": "precision must be one of fp32, bf16",
    "router.top_k=3": "router.top_k is 3, but domain 'recipes' has 2 expert(s)",
    "model.dim=18": "dim 18 is not divisible by num_heads 4",
    "model.num_kv_heads=3": "not divisible by num_kv_heads",
    "router.sets={recipes: 2}": "no experts given for domain 'ships'",
    "router.sets={recipes: 2, ships: 2, cars: 2}": "unknown domain 'cars'; known domains: recipes, ships",
    "phases=[{until: null, weights: {cars: 1}}]": "unknown domain 'cars'",
    "phases=[{until: 99, weights: null}, {until: null}]": "phases must end in ascending order",
    "model.vocab_size=299": "the dataset has token ids up to 299",
    "model.sparse_layers=some": "sparse_layers must be all, none, every:N or upper:N",
    "schedule.name=linear": "schedule.name must be one of cosine, wsd, constant",
    "micro_batch=3": "global_batch 4 is not a multiple of micro_batch 3",
    "global_batch=100000000000": "do not fit into one forward pass",
    "sequence_length=1000000000": "do not fit into one forward pass",
    "device=tpu": "device must be one of auto, cpu, cuda",
    "model=giant": "unknown choice model=giant; sigmoe's choices: glam_64b_64e, mixtral_8x7b, olmoe_1b_7b, "
    "pangu_sigma, qwen3_30b_a3b, small, switch_base_128, tiny",
    "experiment=foo": "unknown choice experiment=foo; sigmoe's choices: none, quickstart",
    "router.name=switch": "train: router.name must be one of top_k, domain_top_k, rre",
    "router=rre router.top_k=2": "top_k must be 1",
    "dataset=nowhere": "nowhere",
    "--fast": "unknown option --fast",
    "steps": "write key=value",
    "steps=[": "'steps=[' cannot be read",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_and_nothing_written(train, tmp_path, capfd, mistake):
    words = mistake.split(" ") if mistake.startswith("router=rre") else [mistake]
    assert train("out=run", *words) == 2
    told = capfd.readouterr().err
    assert MISTAKES[mistake] in told
    assert told.count("\n") == 1, told
    assert not list(tmp_path.iterdir())


def test_missing_keys_are_named(capfd):
    assert main(["train", "out=run"]) == 2
    assert capfd.readouterr().err.startswith("sigmoe train: missing key dataset")


def test_a_directory_that_is_no_run_is_left_alone(train, tmp_path, capfd):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("dear diary")
    assert train("out=notes") == 2
    assert "out=notes exists and is not a run" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["diary.txt"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.dim=32", "model.dim was 16"),
        ("seed=1", "seed was 0"),
        ("global_batch=8", "global_batch was 4"),
        ("router=rre", "model.router.name was 'domain_top_k'"),
    ],
)
def test_a_resumed_run_must_be_the_same_run(train, capfd, change, told):
    assert train("out=run", "stop_at=1") == 0
    capfd.readouterr()
    assert train("out=run", change) == 2
    error = capfd.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_checkpoint_of_another_shape_is_refused(train, tmp_path, capfd):
    assert train("out=small", "stop_at=1") == 0
    assert train("out=large", "stop_at=1", "model.dim=32") == 0
    (tmp_path / "small/checkpoints").rename(tmp_path / "away")
    (tmp_path / "large/checkpoints").rename(tmp_path / "small/checkpoints")
    capfd.readouterr()
    assert train("out=small") == 2
    error = capfd.readouterr().err
    assert "change the model config back" in error
    assert "Traceback" not in error


def test_ids_beyond_the_vocabulary_are_found_before_the_start(train, dataset, tmp_path, capfd, monkeypatch):
    """A damaged token file: file and offset are named."""
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    tokens = np.memmap(copy / "ships.train.bin", dtype=np.uint16, mode="r+")
    tokens[17] = 301
    tokens.flush()
    assert train("out=run", f"dataset={copy}") == 2
    error = capfd.readouterr().err
    assert "ships.train.bin" in error
    assert "34" in error
    assert not (tmp_path / "run").exists()


def test_too_little_disk_is_said_before_the_start(train, tmp_path, capfd, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert train("out=run") == 1
    assert "free" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_exits_with_two_and_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sigmoe.launch.train", "dataset=nowhere", "out=run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr
    assert not list(tmp_path.iterdir())


JUNK = [None, -1, 0, 10**30, 1.5, float("nan"), float("inf"), True, "", "x", "*", [], [1], {}, {"a": 1}, [[]], "\x00"]


def test_two_hundred_malformed_configs_give_a_value_error_or_a_config():
    """Junk in random places: never anything but a one-line ValueError, or a config that was still valid."""
    chooser, refused = random.Random(0), 0
    base = compose_command("train", ["dataset=x", "out=y", "model.vocab_size=300"])
    for _ in range(200):
        config = _with_junk(base, chooser)
        try:
            TrainConfig.load(config).model.build_registry(("recipes", "ships"))
        except ValueError as error:
            refused += 1
            assert str(error)
    assert refused > 120


def _with_junk(base, chooser):
    """Return a copy of `base` with one to three values replaced, removed or added."""
    import copy

    config = copy.deepcopy(base)
    for _ in range(chooser.randint(1, 3)):
        node = config
        while True:
            key = chooser.choice(list(node))
            if not (isinstance(node[key], dict) and node[key] and chooser.random() < 0.8):
                break
            node = node[key]
        match chooser.choice(["replace", "replace", "replace", "remove", "add"]):
            case "replace":
                node[key] = chooser.choice(JUNK)
            case "remove":
                if len(node) > 1:
                    del node[key]
            case "add":
                node[chooser.choice(["zzz", "lr", "name"])] = chooser.choice(JUNK)
    return config


def test_an_experiment_sets_what_the_root_file_leaves_to_it():
    config = TrainConfig.load(
        compose_command("train", ["experiment=quickstart", "dataset=x", "out=y", "model.vocab_size=300"])
    )
    assert config.steps * config.global_batch * config.sequence_length <= 500_000
    assert (config.model.dim, config.schedule.warmup_steps, config.evaluate.every) == (128, 100, 325)
    assert compose_command("train", ["experiment=quickstart", "dataset=x", "out=y", "steps=7"])["steps"] == 7
