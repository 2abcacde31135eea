"""The benchmark of saves on a tiny model: every figure is there, and it measures the quickstart's model."""

import json
from importlib.util import find_spec

import pytest

from sigmoe.launch.bench import load
from sigmoe.launch.compose import compose_command
from sigmoe.launch.main import main
from sigmoe.launch.train_config import TrainConfig

SIZES = ["model.dim=16", "model.expert_dim=16", "model.vocab_size=40", "batch=2", "sequence_length=8"]
SIZES += ["steps=2", "rounds=2", "warmup=1", "threads=1", "megabytes=13"]
SEVERAL = find_spec("deepspeed") is not None and find_spec("megatron") is not None


def test_stretches_and_rates_are_recorded(tmp_path):
    ranks = [1, 2] if SEVERAL else [1]
    keys = [f"save.{key}" for key in (*SIZES, f"ranks={ranks}".replace(" ", ""), f"folder={tmp_path}")]
    assert main(["bench", "suite=save", f"out={tmp_path}/result", *keys]) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    assert list(measured) == [str(number) for number in ranks]
    for each in measured.values():
        assert len(each["training"]) == len(each["write"]) == len(each["copy"]) == 2
        assert each["num_bytes"] == pytest.approx(3 * 4 * 2**20, rel=0.01)
        for answer in each["training"]:
            none, background, waiting = answer["stretches"]
            assert min(none, background, waiting) > 0
            assert background > answer["snapshot"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"result.md", "result.json"}


def test_the_model_is_the_quickstarts():
    ours = load(compose_command("bench", ["suite=save"])).save
    quickstart = compose_command(
        "train", ["experiment=quickstart", "dataset=none", "out=none", "model.vocab_size=2048"]
    )
    theirs = TrainConfig.load(quickstart)
    # Initial weights take no time.
    assert ours.model == type(ours.model)(**{**vars(theirs.model), "init_std": ours.model.init_std})
    assert (ours.batch, ours.sequence_length) == (theirs.global_batch, theirs.sequence_length)


@pytest.mark.parametrize(
    ("key", "words"), [("ranks=[3]", "ranks must each divide batch (4)"), ("rounds=0", "rounds must be at least 1")]
)
def test_impossible_settings_are_refused(key, words, capfd):
    assert main(["bench", "suite=save", f"save.{key}"]) == 2
    assert words in capfd.readouterr().err
