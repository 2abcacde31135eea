"""`sigmoe prune` end to end: what it writes, what it says and what it refuses."""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sigmoe.launch.main import main
from sigmoe.launch.prune_forecast import forecast_budgets, print_forecast, told_ratio
from sigmoe.moe.canonical import expert_of
from sigmoe.moe.config import RouterConfig
from sigmoe.moe.prune.forecast import forecast
from sigmoe.moe.prune.sums import load_sums
from sigmoe.moe.storage import tensor_reader
from sigmoe.moe.storage.resumable import locked, part_path
from sigmoe.moe.stored import open_model

DATA = ["criterion=reap", "tokens=500"]


@pytest.fixture(scope="session")
def model(write_model):
    return write_model(RouterConfig(name="top_k", num_experts=6))


@pytest.fixture(scope="session")
def stats(model, dataset, tmp_path_factory):
    """The sums of one calibration."""
    folder = tmp_path_factory.mktemp("stats")
    prune(model, folder / "model", f"data={dataset}", f"stats={folder}/sums", "keep=0.5", *DATA)
    return folder / "sums"


@pytest.fixture
def refused(capfd):
    """Run the command; it must end with code 2 and one line, which is returned."""

    def run(path, out, *keys):
        capfd.readouterr()
        assert main(["prune", f"model={path}", f"out={out}", "threads=1", *keys]) == 2
        err = capfd.readouterr().err
        *_, line = err.splitlines()
        assert "Traceback" not in err
        assert err.count("sigmoe prune: ") == 1
        assert not out.exists() or (out / "manifest.json").exists()
        return line

    return run


def prune(path, out, *keys):
    assert main(["prune", f"model={path}", f"out={out}", "threads=1", *keys]) == 0
    return json.loads((out / "report.json").read_text())


def hashes(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_it_calibrates_writes_and_knows_its_own(model, dataset, tmp_path, capfd):
    out, keys = tmp_path / "half", [f"data={dataset}", "domain=ships", "keep=0.5", *DATA]
    report = prune(model, out, *keys)
    assert report["experts"] == [3, 3] and report["text"]["domains"] == {"ships": 500}
    for layer in report["layers"]:
        best = sorted(range(6), key=lambda e: (-layer["saliency"][e], e))[:3]
        assert layer["kept"] == sorted(best)
        assert sum(layer["load_before"]) == pytest.approx(1) and len(layer["load_after"]) == 3
    child = open_model(out)
    assert child.format == "sigmoe" and child.step == 3 and child.config.router.num_experts == 3
    assert main(["verify", f"checkpoint={out}"]) == 0
    before = hashes(out)
    capfd.readouterr()
    assert prune(model, out, *keys) == report and hashes(out) == before
    assert "holds this very pruning already" in capfd.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["half", "half-sums"]


def test_a_forecast_comes_first(model, stats, tmp_path, capfd):
    capfd.readouterr()
    report = prune(model, tmp_path / "half", f"stats={stats}", "keep=0.5")
    told = capfd.readouterr().err
    assert told.index("rough forecast, fitted to two small models (README)") < told.index("written as sigmoe")
    assert "sums of 500 tokens say little" in told
    layers = load_sums(stats).layers
    kept = tuple(tuple(layer["kept"]) for layer in report["layers"])
    budgets = report["forecast"]
    assert [(budget["kept"], budget["chosen"]) for budget in budgets] == [(2 / 6, False), (0.5, True), (5 / 6, False)]
    assert budgets[1] == {"kept": 0.5, "chosen": True, **asdict(forecast(layers, kept))}
    whole, none = (tuple(range(6)),) * 2, forecast_budgets(layers, kept, lambda budget: kept)
    once = forecast_budgets(layers, kept, lambda budget: whole)
    assert [budget["kept"] for budget in once] == [0.5, 1.0] and [budget["chosen"] for budget in none] == [True]
    capfd.readouterr()
    print_forecast(none, 5000)
    assert "say little" not in (told := capfd.readouterr().err)
    assert told.rstrip().endswith("theirs)")  # of other budgets there is nothing to say
    print_forecast(once, 5000)
    assert "100% 1.00" in capfd.readouterr().err
    assert [told_ratio(added) for added in (0.0, 1e-3, 0.01, 1.0)] == ["1.00", "below 1.01", "1.01", "2.72"]
    broken = replace(layers[0], easy_ep_E=torch.full((6,), torch.nan, dtype=torch.float64))
    assert forecast_budgets([broken, layers[1]], kept, lambda budget: kept) is None


def test_stored_sums_serve_another_budget_without_text(model, stats, tmp_path):
    report = prune(model, tmp_path / "unequal", f"stats={stats}", "criterion=gate", "global=7", "merge=true")
    child = open_model(tmp_path / "unequal")
    assert sum(report["experts"]) == 7 and child.config.router.num_experts == tuple(report["experts"])
    assert report["text"]["tokens"] == 500
    again = prune(tmp_path / "unequal", tmp_path / "again", "criterion=weight", "experts=2")
    assert again["experts"] == [2, 2] and open_model(tmp_path / "again").config.router.num_experts == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_of_dropped_experts_nothing_is_read(model, stats, tmp_path, monkeypatch):
    stored, spans = open_model(model).tensors, []
    read = tensor_reader._read_exactly

    def noted(descriptor, target, offset):
        spans.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), offset, offset + target.nbytes))
        read(descriptor, target, offset)

    monkeypatch.setattr(tensor_reader, "_read_exactly", noted)
    report = prune(model, tmp_path / "out", f"stats={stats}", "keep=0.5", "check=false", "verify=false")
    kept = {(layer["layer"], expert) for layer in report["layers"] for expert in layer["kept"]}
    dropped = {name for name in stored.names() if expert_of(name) is not None and expert_of(name) not in kept}
    assert len(dropped) == 2 * 3 * 3 and spans
    for name in dropped:
        file, extent = stored._find(name)
        assert not any(f == str(file) and begin < extent.end and extent.begin < end for f, begin, end in spans)
    assert {tensor["sha256"] for tensor in report["tensors"].values()} == {None}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_model_is_found_before_it_is_read(model, stats, dataset, tmp_path, refused):
    damaged = tmp_path / "models/damaged"
    shutil.copytree(model, damaged)
    weights = next(damaged.rglob("model*.safetensors"))
    flip(weights, -3)
    (out := tmp_path / "out").mkdir()
    for keys in ([f"data={dataset}", *DATA], ["criterion=weight"], [f"stats={stats}"]):
        assert weights.name in refused(damaged, out / "half", "keep=0.5", *keys)
        assert not any(out.iterdir())  # no sums of it either


def test_two_do_not_calibrate_into_one_place(model, dataset, tmp_path, refused):
    keys = [f"data={dataset}", f"stats={tmp_path}/sums", "keep=0.5", *DATA]
    with locked(part_path(tmp_path / "sums"), "not this one"):
        line = refused(model, tmp_path / "half", *keys)
    assert f"another process is calibrating into {tmp_path}/sums: wait for it, or give another stats=" in line
    prune(model, tmp_path / "half", *keys)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["half", "sums"]


def test_what_a_kill_left_beside_finished_sums_goes(model, dataset, stats, tmp_path):
    shutil.copytree(stats, tmp_path / "half-sums")
    part_path(tmp_path / "half-sums").mkdir()
    (part_path(tmp_path / "half-sums") / "step-00000.safetensors").write_bytes(b"old")
    prune(model, tmp_path / "half", f"data={dataset}", "keep=0.5", *DATA)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["half", "half-sums"]


def test_sums_do_not_go_into_a_file(model, dataset, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    line = refused(model, tmp_path / "half", f"data={dataset}", f"stats={tmp_path}/file/sums", "keep=0.5", *DATA)
    assert f"{tmp_path}/file is no directory" in line


def test_a_bias_and_a_single_domain_are_cut_too(write_model, tmp_path):
    router = RouterConfig(name="domain_top_k", sets={"law": 5}, balance="bias")
    path = write_model(router, ("law",), sparse_layers="upper:1", ffn_dim=40)
    report = prune(path, tmp_path / "out", "experts=3", "criterion=random", "seed=4")
    parent, child = open_model(path).tensors, open_model(tmp_path / "out")
    (kept,) = (layer["kept"] for layer in report["layers"])
    for leaf in ("weight", "e_score_correction_bias"):
        name = f"model.layers.1.block_sparse_moe.gate.{leaf}"
        assert torch.equal(child.tensors.read(name), parent.read(name)[kept])
    assert child.registry.names == ("law",) and child.registry.sets(0) == ((0, 1, 2),)
    other = prune(path, tmp_path / "other", "experts=3", "criterion=random", "seed=5")
    assert other["layers"][0]["saliency"] != report["layers"][0]["saliency"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["criterion=weight"], "give one of keep=, experts=, global= and bytes="),
        (["criterion=weight", "keep=0.5", "experts=2"], "give one of"),
        (["keep=0.5"], "criterion=reap needs calibration text: give data="),
        (["keep=0.5", "criterion=weight", "merge=true"], "merge=true needs calibration text"),
        (["keep=0.5", "criterion=best"], "criterion must be one of random, weight, frequency"),
        (["keep=0.5", "criterion=weight", "domain=ships"], "domain names what is taken of data="),
        (["keep=0.5", "stats=nowhere"], "stats=nowhere does not exist: give data= too"),
        (["experts=1", "criterion=weight"], "1 in sparse layer 0"),
        (["keep=0.5", "data=nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["bytes=12", "criterion=weight"], "the model still has"),
        (["keep=0.5", "criterion=weight", "file_bytes=1"], "file_bytes must be at least"),
        (["keep=0.5", "criterion=weight", "tokens=0"], "prune: tokens must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(model, tmp_path, refused, keys, words):
    assert words in refused(model, tmp_path / "out", *keys)
    assert not any(tmp_path.iterdir())


def test_what_stands_is_left(model, stats, write_model, dataset, tmp_path, refused):
    out = tmp_path / "out"
    prune(model, out, f"stats={stats}", "keep=0.5", "criterion=reap")
    before = hashes(out)
    line = refused(model, out, f"stats={stats}", "keep=0.5", "criterion=gate")
    assert line.endswith('made of this model with criterion="reap": remove it or give another out=')
    assert "lies inside" in refused(model, model / "deep", "keep=0.5", "criterion=weight")
    other = write_model(RouterConfig(name="top_k", num_experts=6), tie_embeddings=True)
    assert "another model" in refused(other, tmp_path / "no", f"stats={stats}", "keep=0.5")
    assert "other text" in refused(
        model, tmp_path / "no", f"stats={stats}", f"data={dataset}", "tokens=400", "keep=0.5"
    )
    assert hashes(out) == before


def test_what_was_made_unchecked_does_not_do_for_checked(model, stats, tmp_path, refused):
    keys = [f"stats={stats}", "keep=0.5"]
    assert not prune(model, tmp_path / "out", *keys, "check=false")["parent_checked"]
    assert "holds this very pruning, made without check=true" in refused(model, tmp_path / "out", *keys)
    assert not prune(model, tmp_path / "out", *keys, "check=false")["parent_checked"]


def test_only_learned_gates_are_pruned(write_model, tmp_path, refused):
    for router in (
        RouterConfig(name="domain_top_k", sets=3),
        RouterConfig(name="rre", sets=3, top_k=1, balance="none"),
    ):
        path = write_model(router, ("law", "code"))
        assert "cannot be pruned: its router is" in refused(path, tmp_path / "out", "keep=0.5", "criterion=weight")


def test_a_format_that_cannot_hold_it_is_named(model, tmp_path, refused):
    assert main(["convert", f"model={model}", "to=mixtral", "verify=false", f"out={tmp_path}/hf"]) == 0
    keys = ["experts=[2,4]", "criterion=weight"]
    line = refused(tmp_path / "hf", tmp_path / "out", *keys)
    assert "mixtral cannot hold the pruned model" in line and "format=sigmoe" in line
    report = prune(tmp_path / "hf", tmp_path / "out", *keys, "format=sigmoe")
    assert report["experts"] == [2, 4] and report["format"] == "sigmoe"
    half = prune(tmp_path / "hf", tmp_path / "half", "keep=0.5", "criterion=weight")
    assert half["format"] == "mixtral" and main(["verify", f"checkpoint={tmp_path}/half"]) == 0
