"""Healing: it lowers the loss on its text, moves gates and experts alone, and gives the same bytes again."""

import json
from dataclasses import replace

import pytest
import torch

from sigmoe.launch.heal import check_host_memory
from sigmoe.launch.main import main
from sigmoe.launch.prune import _healing
from sigmoe.moe.config import RouterConfig
from sigmoe.moe.prune.plan import plan_pruned
from sigmoe.moe.stored import open_model

SPARSE = ".block_sparse_moe."


@pytest.fixture(scope="module")
def model(write_model):
    return write_model(RouterConfig(name="top_k", num_experts=4, balance="bias"))


@pytest.fixture(scope="module")
def prune(model, dataset, tmp_path_factory):
    """Prune by half; returns the directory and its report."""
    folder = tmp_path_factory.mktemp("healed")
    keys = [f"model={model}", f"data={dataset}", "tokens=1000", "keep=0.5", f"stats={folder}/sums", "threads=1"]

    def run(name, *more):
        assert main(["prune", *keys, f"out={folder}/{name}", *more]) == 0
        return folder / name, json.loads((folder / name / "report.json").read_text())

    return run


def test_gates_and_experts_heal_and_nothing_else(prune):
    plain, _ = prune("plain")
    out, report = prune("healed", "heal=12", "heal_lr=3e-3", "evaluate=400")
    before, after = open_model(plain).tensors, open_model(out).tensors
    moved = {name for name in after.names() if not torch.equal(before.read(name), after.read(name))}
    learned = {name for name in after.names() if SPARSE in name and not name.endswith("bias")}
    assert moved == learned == {name for name, tensor in report["tensors"].items() if tensor["healed"]}
    assert len(report["healed"]["losses"]) == 12
    for row, unhealed in zip(report["losses"], report["healed"]["losses_before"], strict=True):
        assert row["pruned_loss"] < unhealed["pruned_loss"] and row["parent_loss"] == unhealed["parent_loss"]


def test_the_same_bytes_again(prune):
    first, _ = prune("first", "heal=3")
    second, _ = prune("second", "heal=3")
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def test_losses_are_told_of_equal_text_alone():
    told = _healing([3.0, 4.0, 2.0, 3.5], batches=3)
    assert told == ": loss 3.000 when the last batch was first taken, 3.500 in the end"
    assert _healing([3.0, 4.0], batches=2) == _healing([3.0, 4.0]) == ""


def test_what_was_healed_otherwise_is_refused(prune, capfd):
    out, _ = prune("other", "heal=2")
    capfd.readouterr()
    with pytest.raises(AssertionError):
        prune("other", "heal=3")
    assert "made of this model with heal=2: remove it" in capfd.readouterr().err
    with pytest.raises(AssertionError):
        prune("other", "heal=2", "evaluate=50")
    assert f"{out} holds this very pruning, made without evaluate=50" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_stops_it(prune, capfd):
    with pytest.raises(AssertionError):
        prune("burst", "heal=8", "heal_lr=1e30")
    assert "is not finite: give a lower heal_lr" in capfd.readouterr().err


def test_a_model_beyond_memory_is_refused(model):
    stored = open_model(model)
    plan = plan_pruned(stored.config, stored.registry, ((0, 1), (0, 1)))
    check_host_memory(plan)
    plan = replace(plan, config=replace(plan.config, vocab_size=1 << 44))
    with pytest.raises(ValueError, match="heal trains the whole model: that takes"):
        check_host_memory(plan)
