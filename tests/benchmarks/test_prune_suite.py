"""The pruning benchmark on a tiny model: what it counts is what was asked for."""

import json
import sys

import pytest

from sigmoe.launch.main import main

SIZES = ["layers=2", "dim=128", "expert_dim=512", "vocab_size=512", "rounds=1"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bytes_memory_and_turns_are_recorded(tmp_path):
    keys = [f"prune.{key}" for key in (*SIZES, f"folder={tmp_path}")]
    assert main(["bench", "suite=prune", f"out={tmp_path}/result", *keys]) == 0
    measured = json.loads((tmp_path / "result.json").read_text())["measured"]
    expert = 3 * 128 * 512 * 2
    dropped = 2 * 4 * (expert + 128 * 2)
    assert measured["parent"] - measured["kept"] == dropped
    assert len(measured["prune"]) == len(measured["hashed"]) == len(measured["copy"]) == 1
    for answer in measured["prune"] + measured["hashed"]:
        # Of the dropped experts one row each of three tensors, by which the model is known.
        assert measured["kept"] < answer["bytes_read"] < measured["kept"] + dropped / 10
        assert answer["seconds"] > 0 and answer["peak_bytes"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"result.md", "result.json"}


@pytest.mark.parametrize("keys", [["prune.keep=1.0"], ["prune.layers=0"]])
def test_impossible_settings_are_refused(keys, capfd):
    assert main(["bench", "suite=prune", *keys]) == 2
    assert keys[0].partition("=")[0].partition(".")[2] in capfd.readouterr().err
