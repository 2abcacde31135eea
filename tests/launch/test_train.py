"""`sigmoe train` from end to end, on a tiny model: the same bits twice, in one go or in pieces."""

import json
import re
import shutil

import pytest
import torch
import yaml

from sigmoe.moe.storage.checkpoint import open_checkpoint


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [row["loss"] for row in metrics(run) if "loss" in row]


def files(run, step):
    """Return the hash of every file of a checkpoint."""
    return json.loads((run / "checkpoints" / f"step-{step:08}" / "manifest.json").read_text())["files"]


def tensors(run, step):
    reader = open_checkpoint(run / "checkpoints" / f"step-{step:08}").model
    return {name: reader.read(name) for name in reader.names()}


ROUTERS = {
    "domain_top_k": ["router.sets=3"],
    "top_k": ["router=top_k", "router.num_experts=4", "~router.sets"],
    "rre": ["router=rre", "router.sets=2"],
}


@pytest.mark.parametrize("router", ROUTERS)
def test_the_same_bits_twice_and_in_pieces(train, tmp_path, router):
    settings = [*ROUTERS[router], "save.every=5", "router.capacity_factor=1.25"]
    assert train(*settings, "out=one") == 0
    assert train(*settings, "out=two") == 0
    assert train(*settings, "out=pieces", "stop_at=5") == 0
    assert train(*settings, "out=pieces") == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "two") == losses(tmp_path / "pieces")
    for step in (5, 10):
        expected = files(tmp_path / "one", step)
        assert expected == files(tmp_path / "two", step) == files(tmp_path / "pieces", step)
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0] - 0.2


@pytest.mark.parametrize(
    "settings",
    [
        ["router.balance_scope=batch", "router.sets=3"],
        ["router.balance=bias", "router.sets=3"],
        ["router.jitter=0.1", "router.z_loss=0.01"],
        ["precision=bf16"],
        ["precision=fp64"],
        ["model.embedding_slots={ships: 1}", "model.qk_norm=head", "model.sparse_layers=upper:1"],
        ["micro_batch=2"],
    ],
    ids=" ".join,
)
def test_pieces_equal_the_whole_under_every_kind_of_state(train, tmp_path, settings):
    assert train(*settings, "out=whole", "steps=6") == 0
    assert train(*settings, "out=pieces", "steps=6", "stop_at=3") == 0
    assert train(*settings, "out=pieces", "steps=6") == 0
    assert files(tmp_path / "whole", 6) == files(tmp_path / "pieces", 6)


def test_accumulation_does_not_change_the_result(train, tmp_path):
    assert train("out=one") == 0
    assert train("out=four", "micro_batch=1") == 0
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    first, second = metrics(tmp_path / "one")[1], metrics(tmp_path / "four")[1]
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
    assert second["aux_loss"] == pytest.approx(first["aux_loss"], rel=1e-5)


def test_a_flipped_byte_falls_back_to_the_step_before_and_says_so(train, tmp_path, capfd):
    assert train("out=run", "save.every=2", "save.keep=null") == 0
    expected = files(tmp_path / "run", 10)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000010")
    victim = tmp_path / "run/checkpoints/step-00000008/model/model-00001-of-00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[-7] ^= 1
    victim.write_bytes(data)
    capfd.readouterr()
    assert train("out=run", "save.every=2", "save.keep=null") == 0
    told = " ".join(capfd.readouterr().err.split())
    assert "model-00001-of-00001.safetensors" in told
    assert re.search(r"resuming run at step 6", told)
    assert files(tmp_path / "run", 10) == expected


def test_the_closing_table_names_every_domain(train, capfd):
    assert train("out=run") == 0
    told = capfd.readouterr().out
    for word in ("recipes", "ships", "perplexity", "bits per byte", "unigram", "load of its experts"):
        assert word in told


def test_metrics_hold_what_is_promised(train, tmp_path):
    assert train("out=run", "evaluate.every=5") == 0
    rows = metrics(tmp_path / "run")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 11))
    promised = "tokens loss lr grad_norm tokens_per_second flops_share aux_loss z_loss dropped skipped".split()
    for key in [*promised, "loss/recipes", "loss/ships", "expert_load/0", "expert_load/1"]:
        assert key in steps[0]
    # Both domains have two of the four sequences of 32 tokens.
    assert steps[-1]["tokens"] == 10 * 4 * 32
    assert [row["step"] for row in rows if "heldout_loss/ships" in row] == [0, 5, 10]


def test_a_phase_feeds_and_trains_what_it_says(train, tmp_path):
    phases = (
        "phases=[{until: 4, weights: null, train: ['*']},"
        "{until: null, weights: {ships: 1}, train: ['model.layers.*.experts.2.*', 'model.layers.*.experts.3.*']}]"
    )
    assert train(phases, "out=run", "save.every=4", "steps=8") == 0
    before, after = tensors(tmp_path / "run", 4), tensors(tmp_path / "run", 8)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".experts.2." in name or ".experts.3." in name}
    rows = {row["step"]: row for row in metrics(tmp_path / "run") if "loss" in row}
    assert "loss/recipes" in rows[4]
    assert "loss/recipes" not in rows[5]


def test_a_finished_run_is_left_alone(train, tmp_path, capfd):
    assert train("out=run") == 0
    before = files(tmp_path / "run", 10)
    assert train("out=run") == 0
    assert "stands at step 10 already" in capfd.readouterr().err
    assert files(tmp_path / "run", 10) == before


def test_more_steps_go_on_from_the_end(train, tmp_path):
    assert train("out=run", "schedule.name=constant") == 0
    assert train("out=run", "schedule.name=constant", "steps=12") == 0
    assert train("out=whole", "schedule.name=constant", "steps=12") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_the_config_of_a_run_starts_the_same_run(train, tmp_path):
    assert train("out=run", "stop_at=2") == 0
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["model"]["vocab_size"] == 300
    assert config["model"]["router"]["name"] == "domain_top_k"


def test_a_frozen_gate_keeps_its_selection_bias(train, tmp_path):
    phases = "phases=[{until: 3}, {until: null, train: ['model.layers.0.*']}]"
    assert train("router.balance=bias", "router.sets=3", phases, "out=run", "save.every=3", "steps=6") == 0
    before, after = tensors(tmp_path / "run", 3), tensors(tmp_path / "run", 6)
    name = "model.layers.{}.block_sparse_moe.gate.e_score_correction_bias"
    assert not torch.equal(before[name.format(0)], after[name.format(0)])
    assert torch.equal(before[name.format(1)], after[name.format(1)])
    assert before[name.format(1)].any()
