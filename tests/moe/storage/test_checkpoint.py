"""A checkpoint vouches for every byte of it: what was changed, cut off, added or lost is refused by name."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmoe.moe.storage.checkpoint import (
    FORMAT_VERSION,
    MANIFEST,
    CheckpointContent,
    checkpoint_bytes,
    encode_manifest,
    load_yaml,
    open_checkpoint,
    write_checkpoint,
)
from sigmoe.moe.storage.durable import durable_directory
from sigmoe.moe.storage.tensors import named_tensors, write_tensors

EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.w{}.weight"
EXPERTS = [(layer, expert) for layer in (0, 2) for expert in range(11)]


def model_tensors():
    generator = torch.Generator().manual_seed(0)
    names = [EXPERT.format(*pair, w) for pair in EXPERTS for w in (1, 2, 3)]
    names += ["model.embed_tokens.weight", "model.layers.0.block_sparse_moe.gate.weight", "model.norm.weight"]
    return {name: torch.randn(3, 4, generator=generator) for name in names}


def optimizer_tensors(model):
    moments = {f"{name}.exp_avg": tensor * 0.1 for name, tensor in model.items()}
    return {**moments, **{f"{name}.step": torch.tensor(3.0) for name in model}}


def content(**changes):
    model = model_tensors()
    whole = CheckpointContent(
        model=named_tensors(model),
        optimizer=named_tensors(optimizer_tensors(model)),
        state={"step": 3, "consumed_samples": 24, "balance_fractions": {"0": [0.25, 1 / 3]}, "name": "汉字"},
        config={"model": {"dim": 4, "router": {"name": "top_k"}}, "phases": [{"until": None}], "a": 1, "text": "汉字"},
        registry={"domains": [{"name": "a", "id": 0, "slot": 0, "experts": [[0, 1]]}]},
        tokenizer=b'{"version": "1.0"}',
        hf_config={"model_type": "mixtral"},
    )
    return dataclasses.replace(whole, **changes)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "step-00000003"
    write_checkpoint(path, content())
    return path


@pytest.fixture
def checkpoint(written, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / written.name))


FILES = [
    "config.yaml",
    "manifest.json",
    "model/config.json",
    "model/model-00001-of-00001.safetensors",
    "model/model.safetensors.index.json",
    "optimizer/optimizer-00001-of-00001.safetensors",
    "optimizer/optimizer.safetensors.index.json",
    "registry.json",
    "state.json",
    "tokenizer.json",
]


def assert_refused(path):
    """The one line with which opening or verifying refuses."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        open_checkpoint(path).verify()
    return str(caught.value)


def rewrite(path, change):
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_bytes(encode_manifest(manifest))


def vouch_for(path, name):
    """Make the manifest agree with a changed file, as someone who means harm would."""
    data = (path / name).read_bytes()
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(path, lambda manifest: manifest["files"].update({name: record}))


def test_the_layout_on_the_disk(written):
    files = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    assert files == FILES
    manifest = json.loads((written / MANIFEST).read_text())
    assert list(manifest) == ["format_version", "files", "experts", "sha256"]
    assert sorted(manifest["files"]) == [name for name in FILES if name != MANIFEST]
    for name, record in manifest["files"].items():
        data = (written / name).read_bytes()
        assert record == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["experts"] == [list(pair) for pair in EXPERTS]


def test_everything_comes_back(written):
    checkpoint = open_checkpoint(written)
    checkpoint.verify()
    whole, model = content(), model_tensors()
    assert (checkpoint.state, checkpoint.config, checkpoint.registry) == (whole.state, whole.config, whole.registry)
    assert list(checkpoint.config) == list(whole.config)
    assert checkpoint.tokenizer == whole.tokenizer
    for reader, tensors in ((checkpoint.model, model), (checkpoint.optimizer, optimizer_tensors(model))):
        assert set(reader.names()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name), tensor)


def test_what_a_checkpoint_may_lack(tmp_path):
    write_checkpoint(tmp_path / "bare", content(optimizer={}, tokenizer=None, hf_config=None))
    checkpoint = open_checkpoint(tmp_path / "bare")
    checkpoint.verify()
    assert checkpoint.optimizer is None
    assert checkpoint.tokenizer is None
    assert not (tmp_path / "bare/model/config.json").exists()


@given(st.randoms(use_true_random=False))
@settings(max_examples=5, deadline=None)
def test_equal_state_gives_equal_files_in_any_order(tmp_path_factory, written, random):
    def shuffled(tensors):
        names = list(tensors)
        random.shuffle(names)
        return {name: tensors[name] for name in names}

    path = tmp_path_factory.mktemp("order") / "other"
    whole = content()
    write_checkpoint(path, content(model=shuffled(whole.model), optimizer=shuffled(whole.optimizer)))
    for name in FILES:
        assert (path / name).read_bytes() == (written / name).read_bytes()


def test_the_estimate_of_the_size_is_enough(written):
    actual = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    num_tensors = len(content().model) + len(content().optimizer)
    assert actual <= checkpoint_bytes(content()) <= actual + (1 << 20) + 256 * num_tensors


def test_the_estimate_is_enough_for_many_small_tensors_with_long_names(tmp_path):
    names = [f"model.layers.{i}.block_sparse_moe.experts.{i}.w1.weight.exp_avg_sq" for i in range(8000)]
    whole = content(optimizer=named_tensors(dict.fromkeys(names, torch.zeros(1))))
    write_checkpoint(tmp_path / "many", whole)
    actual = sum(path.stat().st_size for path in (tmp_path / "many").rglob("*") if path.is_file())
    assert actual <= checkpoint_bytes(whole)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_one_flipped_byte_anywhere_is_refused(checkpoint, name, place, flip):
    data = bytearray((checkpoint / name).read_bytes())
    data[round(place * (len(data) - 1))] ^= flip
    (checkpoint / name).write_bytes(data)
    told = assert_refused(checkpoint)
    assert Path(name).name in told
    assert checkpoint.name in told


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cut", [1, 2, 20, None])
def test_a_truncated_file_is_refused(checkpoint, name, cut):
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data[:-cut] if cut else b"")
    assert Path(name).name in assert_refused(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(checkpoint, name):
    (checkpoint / name).unlink()
    assert Path(name).name in assert_refused(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_place_of_a_file_is_refused(checkpoint, tmp_path, name):
    (checkpoint / name).rename(tmp_path / "elsewhere")
    (checkpoint / name).symlink_to(tmp_path / "elsewhere")
    if name != MANIFEST:  # which says nothing of itself
        assert Path(name).name in assert_refused(checkpoint)


def test_an_added_file_is_refused(checkpoint):
    (checkpoint / "model/more.safetensors").write_bytes(b"")
    assert "model/more.safetensors" in assert_refused(checkpoint)


class Hostile:
    """Unpickled, it makes the sentinel."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dump", [pickle.dumps, torch.save], ids=["pickle", "torch"])
def test_a_hostile_pickle_is_never_executed(checkpoint, tmp_path, name, dump):
    hostile, sentinel = Hostile(tmp_path / "sentinel"), tmp_path / "sentinel"
    if dump is pickle.dumps:
        (checkpoint / name).write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, checkpoint / name)
    if name != MANIFEST:
        assert_refused(checkpoint)
        vouch_for(checkpoint, name)
    if name in ("tokenizer.json", "model/config.json"):  # bytes that are handed on and not read here
        open_checkpoint(checkpoint).verify()
    else:
        assert Path(name).name in assert_refused(checkpoint)
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(hostile))
    assert sentinel.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir ['{sentinel}']",
        "a: !!python/object/new:os.mkdir ['{sentinel}']",
        '!!int ""',
        "!!bool x",
        "!!timestamp x",
        "2001-99-99",
        "? [a]\n: b",
        "a: *b",
        "a: [",
        "\x00",
        "- a",
        "[" * 5000,
    ],
)
def test_a_hostile_config_is_one_line(checkpoint, tmp_path, text):
    (checkpoint / "config.yaml").write_text(text.replace("{sentinel}", str(tmp_path / "sentinel")))
    assert "config.yaml" in assert_refused(checkpoint)
    assert not (tmp_path / "sentinel").exists()


@given(st.text("[]{}!:-?*&,'\"|>%@ \n#abint0") | st.binary(max_size=30))
@settings(deadline=None, max_examples=300)
def test_any_yaml_is_data_or_a_value_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    try:
        load_yaml(path)
    except ValueError as error:
        assert str(path) in str(error)
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, None, "1"])
def test_another_format_version_is_refused_by_both_numbers(checkpoint, version):
    rewrite(checkpoint, lambda manifest: manifest.update(format_version=version))
    told = assert_refused(checkpoint)
    assert f"format version {version!r}" in told
    assert f"reads {FORMAT_VERSION}" in told


def test_without_a_manifest_it_is_no_checkpoint(checkpoint):
    (checkpoint / MANIFEST).unlink()
    assert "is not a checkpoint" in assert_refused(checkpoint)
    assert "is not a checkpoint" in assert_refused(checkpoint / "never was")


MANIFESTS = {
    "no files": lambda m: m.pop("files"),
    "no experts": lambda m: m.pop("experts"),
    "no size": lambda m: m["files"]["state.json"].pop("size"),
    "no hash": lambda m: m["files"]["state.json"].pop("sha256"),
    "no record": lambda m: m["files"].update({"state.json": 1}),
    "a way out": lambda m: m["files"].update({"../state.json": m["files"]["state.json"]}),
    "an absolute path": lambda m: m["files"].update({"/etc/passwd": m["files"]["state.json"]}),
    "an expert too many": lambda m: m["experts"].append([2, 11]),
    "an expert too few": lambda m: m["experts"].pop(),
    "an expert twice": lambda m: m["experts"].append([0, 0]),
    "experts as text": lambda m: m["experts"].append("00"),
    "a name that is no text": lambda m: m["files"].update({"\ud800": m["files"]["state.json"]}),
    "a hash that is no text": lambda m: m["files"]["state.json"].update(sha256="\ud800"),
    "experts as fractions": lambda m: m["experts"].append([0.0, 1.0]),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_lies_is_refused(checkpoint, case):
    rewrite(checkpoint, MANIFESTS[case])
    assert_refused(checkpoint)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(EXPERT.format(2, 7, 3)), "expert 7 of layer 2 has 2 of its 3 weights"),
        (lambda t: [t.pop(EXPERT.format(2, 7, w)) for w in (1, 2, 3)], "expert 7 of layer 2 is missing from model/"),
        (lambda t: t.update({EXPERT.format(2, "07", 1): torch.zeros(1)}), "expert 7 of layer 2 has 4 of its 3"),
        (
            lambda t: t.update({EXPERT.format(1, 0, 1): torch.zeros(1)}),
            "expert 0 of layer 1 is missing from the manifest",
        ),
    ],
)
def test_each_global_expert_is_there_exactly_once(checkpoint, tmp_path, change, words):
    """Files that are whole, and a manifest that vouches for them, but other experts."""
    tensors = model_tensors()
    change(tensors)
    with durable_directory(tmp_path / "other") as directory:
        write_tensors(directory, "model", "model", named_tensors(tensors))
    for name in directory.records:
        shutil.copy(tmp_path / "other" / name, checkpoint / name)
        vouch_for(checkpoint, name)
    assert words in assert_refused(checkpoint)


def test_progress_counts_every_byte_up_to_the_total(written):
    seen = []
    open_checkpoint(written).verify(lambda done, total: seen.append((done, total)))
    total = (
        sum(path.stat().st_size for path in written.rglob("*") if path.is_file()) - (written / MANIFEST).stat().st_size
    )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)
    assert {total for _, total in seen} == {total}


def test_an_unreadable_file_is_one_line(checkpoint, monkeypatch):
    """What a bad sector gives: the file opens and reading fails."""
    monkeypatch.setattr("sigmoe.moe.storage.checkpoint.hash_file", lambda *_: os.read(-1, 1))
    assert "cannot be read: Bad file descriptor" in assert_refused(checkpoint)


def test_numbers_that_json_lacks_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_checkpoint(tmp_path / "new", content(state={"loss": float("nan")}))
    assert list(tmp_path.iterdir()) == []


def test_it_is_replaced_on_request_only(checkpoint):
    with pytest.raises(ValueError, match="exists already"):
        write_checkpoint(checkpoint, content())
    write_checkpoint(checkpoint, content(state={"step": 4}), replace=True)
    assert open_checkpoint(checkpoint).state == {"step": 4}
    assert yaml.safe_load((checkpoint / "config.yaml").read_text()) == content().config
