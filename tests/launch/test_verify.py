"""`sigmoe verify`: says ok of what is whole, and names in one line the file, expert or tensor that is not."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from sigmoe.launch.main import main
from sigmoe.moe.storage.checkpoint import encode_manifest, open_checkpoint
from sigmoe.moe.storage.durable import durable_directory
from sigmoe.moe.storage.tensors import named_tensors, write_tensors

MODEL = "model/model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of three checkpoints."""
    out = tmp_path_factory.mktemp("verify") / "run"
    assert main(["train", *tiny, "steps=3", "save.every=1", "threads=1", f"out={out}"]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def verify(capfd):
    """Run the command; returns its exit code, and what it wrote to stdout and stderr."""

    def call(*overrides):
        capfd.readouterr()
        code = main(["verify", *overrides])
        return code, *capfd.readouterr()

    return call


def step(run, number):
    return run / f"checkpoints/step-{number:08}"


def refused(verify, path, *overrides):
    """The one line of the refusal."""
    code, out, err = verify(f"checkpoint={path}", *overrides)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("sigmoe verify: ")
    return line


def edit_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_bytes(encode_manifest(manifest))


def vouch_for(path, name):
    """Make the manifest agree with a changed file."""
    data = (path / name).read_bytes()
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(path, lambda manifest: manifest["files"].update({name: record}))


def edit_config(path, **changes):
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["model"] |= changes
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    vouch_for(path, "config.yaml")


@pytest.mark.parametrize("which", ["step", "checkpoints", "run"])
def test_what_is_whole_is_one_line(verify, finished, which):
    path = {"step": step(finished, 3), "checkpoints": finished / "checkpoints", "run": finished}[which]
    code, out, _ = verify(f"checkpoint={path}")
    files = [file for file in step(finished, 3).rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files if file.name != "manifest.json")
    # Two sparse layers of two domains with two experts each.
    told = f"step 3  {len(files)} files  {size:,} bytes  8 experts in 2 layers"
    assert (code, out) == (0, f"ok  {step(finished, 3)}  {told}\n")


def test_all_means_every_checkpoint(verify, finished):
    code, out, _ = verify(f"checkpoint={finished}", "all=true")
    assert code == 0
    assert [line.split("  ")[:2] for line in out.splitlines()] == [["ok", str(step(finished, n))] for n in (1, 2, 3)]


def test_a_name_that_looks_like_markup_is_printed_as_it_is(verify, run):
    odd = run.rename(run.with_name("[bold]run"))
    code, out, _ = verify(f"checkpoint='{odd}'")
    assert code == 0
    assert out.startswith(f"ok  {step(odd, 3)}  ")


@pytest.mark.parametrize("where", ["step", "run"])
@pytest.mark.parametrize("how", ["flip", "remove", "truncate"])
@pytest.mark.parametrize("name", [MODEL, "optimizer/optimizer.safetensors.index.json", "state.json", "manifest.json"])
def test_damage_is_one_line_that_names_the_file(verify, run, name, how, where):
    file = step(run, 3) / name
    match how:
        case "flip":
            data = bytearray(file.read_bytes())
            data[1] ^= 0x80
            file.write_bytes(data)
        case "remove":
            file.unlink()
        case "truncate":
            file.write_bytes(file.read_bytes()[:-2])
    line = refused(verify, step(run, 3) if where == "step" else run)
    assert "step-00000003" in line
    assert file.name in line


def test_all_finds_an_older_damaged_one(verify, run):
    (step(run, 1) / "registry.json").unlink()
    assert verify(f"checkpoint={run}")[0] == 0
    code, out, err = verify(f"checkpoint={run}", "all=true")
    assert (code, out) == (2, "")
    assert f"{step(run, 1)}/registry.json" in err


def test_a_foreign_file_is_named(verify, run):
    (step(run, 3) / "model/notes.txt").write_text("mine")
    assert "model/notes.txt is not in the manifest" in refused(verify, run)


def test_a_newer_format_is_named(verify, run):
    edit_manifest(step(run, 3), lambda manifest: manifest.update(format_version=2))
    assert "manifest.json: format version 2, this sigmoe reads 1" in refused(verify, run)


def test_a_lost_expert_is_named(verify, run):
    edit_manifest(step(run, 3), lambda manifest: manifest["experts"].remove([1, 3]))
    assert "expert 3 of layer 1 is missing from the manifest" in refused(verify, run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_dim": 24}, "experts.0.w1.weight is [16, 16], config.yaml and registry.json say [24, 16]"),
        ({"vocab_size": 301}, "model.embed_tokens.weight is [300, 16], config.yaml and registry.json say [301, 16]"),
        ({"num_layers": 3}, "step-00000003: config.yaml and registry.json describe no model: domain 'recipes' has"),
        ({"sparse_layers": "upper:1"}, "describe no model: domain 'recipes' has expert sets for 2 of 1 sparse layers"),
        ({"qk_norm": "head"}, "lacks model.layers.0.self_attn.k_norm.weight"),
        ({"dim": "wide"}, "describe no model: model.dim must be a whole number, got 'wide'"),
        ({"depth": 3}, "describe no model: unknown key model.depth"),
    ],
)
def test_shapes_are_those_of_the_config(verify, run, changes, words):
    edit_config(step(run, 3), **changes)
    line = refused(verify, step(run, 3))
    assert words in line
    assert "step-00000003" in line


def test_moments_have_the_shapes_of_their_parameters(verify, run):
    path = step(run, 3)
    reader = open_checkpoint(path).optimizer
    tensors = {name: reader.read(name) for name in reader.names()}
    for change, words in (
        (("model.norm.weight.exp_avg", torch.zeros(17)), "model.norm.weight.exp_avg is [17], config.yaml"),
        (("model.norm.weight.step", torch.zeros(1)), "model.norm.weight.step is [1], config.yaml"),
        (("model.new.weight.exp_avg", torch.zeros(16)), "optimizer holds model.new.weight.exp_avg"),
    ):
        changed = tensors | dict([change])
        with durable_directory(run / "changed", replace=True) as directory:
            write_tensors(directory, "optimizer", "optimizer", named_tensors(changed))
        for name in directory.records:
            shutil.copy(run / "changed" / name, path / name)
            vouch_for(path, name)
        assert words in refused(verify, path)


def test_a_registry_that_holds_other_experts_is_refused(verify, run):
    path = step(run, 3)
    registry = json.loads((path / "registry.json").read_text())
    registry["domains"][1]["experts"][0] = [2, 4]
    (path / "registry.json").write_text(json.dumps(registry))
    vouch_for(path, "registry.json")
    assert "step-00000003: config.yaml and registry.json describe no model: layer 0: expert 3" in refused(verify, path)


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_where_there_is_no_checkpoint_it_says_so(verify, tmp_path, place):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / place} holds no manifest.json" in refused(verify, tmp_path / place)


def test_a_dataset_is_hashed(verify, dataset, tmp_path):
    code, out, err = verify(f"dataset={dataset}")
    assert (code, out.split()[0], err) == (0, "ok", "")
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    data = bytearray((copy / "ships.heldout.bin").read_bytes())
    data[40] ^= 1
    (copy / "ships.heldout.bin").write_bytes(data)
    code, out, err = verify(f"dataset={copy}")
    assert (code, out) == (2, "")
    assert "ships.heldout.bin is damaged" in err


def test_one_of_checkpoint_and_dataset(verify):
    code, _, err = verify()
    assert code == 2
    assert "give checkpoint=DIR or dataset=DIR" in err
