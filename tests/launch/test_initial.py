"""`train initial=DIR`: a fresh run begins where another model stands, whatever wrote it, on any number of ranks."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml

from sigmoe.launch.main import main
from sigmoe.moe.storage.checkpoint import open_checkpoint

STEP = "checkpoints/step-00000003"


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Three steps of two domains, two experts each."""
    out = tmp_path_factory.mktemp("initial") / "trained"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["train", *tiny, "steps=3", f"out={out}"]) == 0
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def refused(train, tmp_path, capsys):
    """Run a command that must fail in one line, with nothing written; returns the line."""

    def run(*overrides):
        before = sorted(tmp_path.rglob("*"))
        assert train(*overrides) == 2
        assert sorted(tmp_path.rglob("*")) == before
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sigmoe train: ")]
        return line.removeprefix("sigmoe train: ")

    return run


def state(run, step):
    return open_checkpoint(run / f"checkpoints/step-{step:08}").state


def files(run, step):
    return json.loads((run / f"checkpoints/step-{step:08}/manifest.json").read_text())["files"]


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_begins_where_another_ended(train, trained, tmp_path):
    assert train(f"initial={trained}", "steps=2", "out=run") == 0
    assert state(tmp_path / "run", 2)["heldout_before"] == state(trained, 3)["heldout_after"]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["initial"] == str(trained)
    assert "initial" not in open_checkpoint(tmp_path / "run/checkpoints/step-00000002").config
    moments = open_checkpoint(tmp_path / "run/checkpoints/step-00000002").optimizer
    assert float(moments.read("model.norm.weight.step")) == 2


def test_a_resumed_run_needs_it_no_more(train, refused, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "gone")
    assert train("initial=gone", "steps=4", "out=whole") == 0
    assert train("initial=gone", "steps=4", "stop_at=2", "out=pieces") == 0
    shutil.rmtree(tmp_path / "gone")
    line = refused("initial=other", "steps=4", "out=pieces")
    assert line.startswith("initial was 'gone' when this run began and is 'other' now")
    assert train("initial=gone", "steps=4", "out=pieces") == 0
    assert files(tmp_path / "whole", 4) == files(tmp_path / "pieces", 4)


def test_what_transformers_reads_and_rounded(train, trained, tmp_path, dataset):
    """An extracted Mixtral in bf16 begins a run of one gate; masters are its numbers exactly."""
    extract = [f"checkpoint={trained}", "domain=ships", "dtype=bf16", "verify=0", f"out={tmp_path}/ships"]
    assert main(["extract", *extract]) == 0
    gate = ["router=top_k", "router.num_experts=2", "~router.sets", "initial=ships"]
    assert train(*gate, "steps=1", "optim.lr=1e-30", "optim.weight_decay=0", "out=run") == 0
    model = open_checkpoint(tmp_path / "run/checkpoints/step-00000001").model
    assert torch.equal(
        model.read("lm_head.weight"), open_checkpoint(trained / STEP).model.read("lm_head.weight").bfloat16().float()
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["model.dim=32"], "it has model.dim=16, model.head_dim=4"),
        (["model.sparse_layers=upper:1"], "it has model.sparse_layers=all, no model.ffn_dim"),
        (["router.top_k=1", "router.renormalize=false"], "it has router.top_k=2, router.renormalize=true"),
        (["router.balance=bias"], "it has no router.balance"),
        (["router=rre", "router.sets=2"], "it has router=domain_top_k, router.top_k=2"),
        (
            ["model.tie_embeddings=true", "model.vocab_size=512"],
            "it has model.vocab_size=300, model.tie_embeddings=false",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_another_model_is_told_in_one_line(refused, trained, settings, line):
    said = refused(f"initial={trained}", *settings, "out=run")
    assert said.startswith(f"initial={trained} is another model than this run's: {line}")


OTHER_SETS = {"router.sets=3": "recipes", "router.sets={recipes: [0, 1], ships: [1, 2, 3]}": "ships"}


@pytest.mark.parametrize("setting", OTHER_SETS)
def test_other_sets_are_told(refused, trained, setting):
    said = refused(f"initial={trained}", setting, "out=run")
    beginning = f"initial={trained} and this run differ in the id, experts or embedding slot of domain "
    assert said.startswith(f"{beginning}{OTHER_SETS[setting]!r}: its domains are recipes, ships")


def test_what_is_no_model_is_told(refused):
    assert refused("initial=nowhere", "out=run") == "nowhere is no model: it does not exist"


def test_a_flipped_bit_is_found(refused, trained, tmp_path):
    shutil.copytree(trained / STEP, tmp_path / "bad")
    path = tmp_path / "bad/model/model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert "is damaged: its SHA-256 is not the one in the manifest" in refused("initial=bad", "out=run")


def test_another_tokenizer_is_told(refused, trained, tmp_path):
    shutil.copytree(trained / STEP, tmp_path / "other")
    (tmp_path / "other/manifest.json").unlink()  # so that it may be changed
    (tmp_path / "other/tokenizer.json").unlink()
    assert "is no model" in refused("initial=other", "out=run")
    assert main(["extract", f"checkpoint={trained}", "domain=ships", "verify=0", f"out={tmp_path}/ships"]) == 0
    tokenizer = tmp_path / "ships/tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    gate = ["router=top_k", "router.num_experts=2", "~router.sets"]
    assert "ships has another tokenizer than" in refused("initial=ships", *gate, "out=run")


@pytest.mark.skipif(
    find_spec("deepspeed") is None or find_spec("megatron") is None, reason="needs deepspeed and megatron-core"
)
def test_two_ranks_begin_alike(train, tiny, trained, tmp_path):
    assert train(f"initial={trained}", "steps=4", "out=one") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [*tiny, f"initial={trained}", "steps=4", "parallel.ep=2", "parallel.zero_stage=2", "out=two"]
    done = subprocess.run(
        [*launch, "-m", "sigmoe.launch.train", *settings],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
