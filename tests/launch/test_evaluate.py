"""`sigmoe evaluate`: the figures against plain sums, the matrix from submodels bit for bit, and mistakes."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from sigmoe.launch.main import main
from sigmoe.launch.models import open_given_model
from sigmoe.moe.batch import IGNORED
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.data.loader import heldout_batches
from sigmoe.moe.domain_choice import choose_domains
from sigmoe.moe.stored import load_model

TOKENS = 400


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run of recipes and ships whose experts differ: large initial weights."""
    return trained(tmp_path_factory, [*tiny, "model.init_std=0.3"])


@pytest.fixture(scope="module")
def global_run(tiny, tmp_path_factory):
    """A run with one gate over all experts."""
    settings = [word for word in tiny if not word.startswith("router.sets")]
    return trained(tmp_path_factory, [*settings, "router=top_k", "router.num_experts=4"])


def trained(tmp_path_factory, settings):
    out = tmp_path_factory.mktemp("evaluate") / "run"
    assert main(["train", *settings, "steps=3", "threads=1", f"out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def submodels(run, tmp_path_factory):
    """The two submodels as transformers reads them, and both domains in sigmoe's format."""
    folder = tmp_path_factory.mktemp("submodels")
    for name, domain in {"recipes": "recipes", "ships": "ships", "both": "[ships,recipes]"}.items():
        assert main(["extract", f"checkpoint={run}", f"domain={domain}", f"out={folder}/{name}", "verify=0"]) == 0
    return folder


@pytest.fixture
def evaluate(dataset, tmp_path, monkeypatch, capfd):
    """Run the command in a folder of its own; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        capfd.readouterr()
        code = main(["evaluate", f"dataset={dataset}", f"tokens={TOKENS}", "batch=3", "threads=1", *overrides])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def measured(evaluate, tmp_path):
    """The JSON of a run of the command that must go well."""

    def call(*overrides):
        code, _, err = evaluate(*overrides, "out=kept")
        assert code == 0, err
        return json.loads((tmp_path / "kept.json").read_text())

    return call


def cells(data):
    """The cells by row and text."""
    return {row["label"]: row["cells"] for row in data["rows"]}


def plainly(run, dataset, text, domain):
    """(loss_sum, tokens, bytes) from the logits of every sequence alone."""
    stored, data = open_given_model(str(run)), open_dataset(dataset)
    model, sizes, sums = load_model(stored), data.token_bytes(), [0.0, 0, 0]
    domain_B = torch.tensor([stored.registry.id_of(domain)])
    for batch in heldout_batches(data, text, batch_size=1, sequence_length=32, max_tokens=TOKENS):
        logits_SV = model(batch.token_BS, start_BS=batch.start_BS, domain_B=domain_B).logits_BSV[0].double()
        for position in (batch.label_BS[0] != IGNORED).nonzero().flatten().tolist():
            label = int(batch.label_BS[0, position])
            sums[0] -= float(logits_SV[position].log_softmax(-1)[label])
            sums[1] += 1
            sums[2] += int(sizes[label])
    return sums


def test_every_figure_of_every_cell(measured, run, dataset):
    found = cells(measured(f"checkpoint={run}", "domain=all"))
    assert list(found) == ["recipes", "ships"]
    for domain, row in found.items():
        assert list(row) == ["recipes", "ships"]
        for text, cell in row.items():
            loss_sum, tokens, num_bytes = plainly(run, dataset, text, domain)
            assert (cell["tokens"], cell["bytes"]) == (tokens, num_bytes)
            assert cell["loss_sum"] == pytest.approx(loss_sum, rel=1e-6)
            assert cell["loss"] == pytest.approx(loss_sum / tokens, rel=1e-6)
            assert cell["perplexity"] == pytest.approx(math.exp(loss_sum / tokens), rel=1e-5)
            assert cell["bits_per_byte"] == pytest.approx(loss_sum / math.log(2) / num_bytes, rel=1e-6)


def test_submodels_give_the_full_models_matrix_bit_for_bit(measured, run, submodels):
    whole = cells(measured(f"checkpoint={run}", "domain=all"))
    alone = measured(f"checkpoint=[{submodels}/recipes,{submodels}/ships]")
    assert [model["format"] for model in alone["models"]] == ["mixtral", "mixtral"]
    assert cells(alone) == whole
    assert whole["recipes"]["ships"]["loss_sum"] != whole["ships"]["ships"]["loss_sum"]


def test_domains_are_mapped_by_name(measured, run, submodels, dataset, tmp_path):
    """A dataset with the same domains in another order, and a submodel of both in sigmoe's format."""
    copy = shutil.copytree(dataset, tmp_path / "turned")
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["domains"] = [{**entry, "id": i} for i, entry in enumerate(reversed(manifest["domains"]))]
    (copy / "dataset.json").write_text(json.dumps(manifest))
    assert open_dataset(copy).domain_names == ("ships", "recipes")
    whole = cells(measured(f"checkpoint={run}", "domain=all"))
    for given in (run, submodels / "both"):
        own = measured(f"checkpoint={given}", "domain=own", "dataset=turned")
        assert cells(own)["own"] == {text: whole[text][text] for text in ("recipes", "ships")}


def test_models_beside_each_other(measured, run, submodels, global_run):
    data = measured(f"checkpoint=[{run},{submodels}/ships,{global_run}]", "domain=[ships]", "texts=ships")
    ships, sub, other = (row["cells"]["ships"]["loss_sum"] for row in data["rows"])
    assert ships == sub != other
    assert [row["label"] for row in data["rows"]] == [
        f"{run}: ships",
        f"{submodels}/ships: ships",
        f"{global_run}: {global_run}",
    ]
    total = [model["parameters"]["total"] for model in data["models"]]
    assert total[0] > total[1] == data["models"][0]["parameters"]["active"]


def test_auto_is_each_document_under_the_domain_that_it_chose(measured, run, dataset):
    data = measured(f"checkpoint={run}", "domain=auto", "auto_tokens=[5,40]", "tokens=null")
    stored, heldout = open_given_model(str(run)), open_dataset(dataset).domain("ships").heldout
    model = load_model(stored)
    documents = [heldout.document(index).tolist() for index in range(heldout.num_documents)]
    for label, length in {"auto, 5 tokens": 5, "auto, 40 tokens": 40}.items():
        cell = cells(data)[label]["ships"]
        chosen = choose_domains(model, [document[:-1][:length] for document in documents])
        right = chosen.count(stored.registry.id_of("ships"))
        assert cell["taken"] == {"recipes": len(chosen) - right, "ships": right}
        assert (cell["documents"], cell["right"]) == (len(chosen), right / len(chosen))
        assert 0 < right < len(chosen)
        assert cell["loss_sum"] == pytest.approx(_under(model, open_dataset(dataset), chosen), rel=1e-6)


def _under(model, data, chosen):
    """The loss of ships' documents, each under the domain that it chose, position by position."""
    order = np.repeat(np.arange(len(chosen)), data.domain("ships").heldout.lengths)
    loss_sum = 0.0
    for batch in heldout_batches(data, "ships", batch_size=1, sequence_length=32):
        at = int(batch.sample_B[0]) * 32
        for domain in (0, 1):
            output = model(
                batch.token_BS, start_BS=batch.start_BS, domain_B=torch.tensor([domain]), label_BS=batch.label_BS
            )
            taken = [chosen[document] == domain for document in order[at : at + 32]]
            loss_sum += float(output.loss_BS[0, : len(taken)][torch.tensor(taken)].double().sum())
    return loss_sum


def test_a_global_gate_and_a_submodel_need_no_domain(evaluate, global_run, submodels):
    for path in (global_run, submodels / "ships"):
        code, out, err = evaluate(f"checkpoint={path}")
        assert (code, [word in out for word in ("recipes", "ships", "perplexity")]) == (0, [True] * 3), err


def test_the_table_marks_the_best_of_a_column(evaluate, measured, run):
    found = cells(measured(f"checkpoint={run}", "domain=all"))
    _, out, err = evaluate(f"checkpoint={run}", "domain=all")
    for text in ("recipes", "ships"):
        least, most = sorted(found[row][text]["bits_per_byte"] for row in found)
        assert f"{least:.4f} *" in out
        assert f"{most:.4f} *" not in out
    assert "sigmoe, 17,488 parameters, 14,352 active a token" in err


def test_the_picture_is_small_and_the_same_every_time(measured, run, tmp_path):
    pictures = []
    for _ in range(2):
        measured(f"checkpoint={run}", "domain=all")
        pictures.append((tmp_path / "kept.svg").read_bytes())
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) < 60_000
    assert pictures[0].startswith(b"<?xml")
    # Letters are paths: it needs no font.
    assert b"<text" not in pictures[0]


def test_what_was_asked_is_kept(measured, run, dataset):
    data = measured(f"checkpoint={run}", "domain=own", "texts=[ships]")
    assert data["dataset"] == {"path": str(dataset), "digest": open_dataset(dataset).digest}
    settings = {"texts": ["ships"], "tokens": TOKENS, "batch": 3, "sequence_length": 32, "device": "cpu", "threads": 1}
    assert data["settings"] == settings
    assert data["models"][0]["checkpoint"] == str(run)
    assert data["models"][0]["path"].endswith("step-00000003")


MISTAKES = {
    "": "routes by domain: give domain=own (each text under its own), auto (a document's first tokens choose), all",
    "domain=trains": "knows no domain 'trains': give domain=own, auto, all or of recipes, ships",
    "domain=[own]": "knows no domain 'own'",
    "domain=[ships,ships]": "domain must list at least one, and each once, got ['ships', 'ships']",
    "domain=own texts=trains": "unknown domain 'trains'; known domains: recipes, ships",
    "domain=own texts=[]": "texts must list at least one",
    "domain=own tokens=0": "tokens must be at least 1, got 0",
    "domain=own batch=0": "batch must be at least 1, got 0",
    "domain=own sequence_length=1": "sequence_length must be at least 2, got 1",
    "domain=own sequence_length=1000000000": "do not fit into one forward pass: lower batch or sequence_length",
    "domain=auto auto_tokens=1": "auto_tokens must be at least 2",
    "domain=auto auto_tokens=[]": "auto_tokens must be at least 2",
    "domain=own dataset=nowhere": "nowhere is no dataset",
    "domain=own checkpoint=nowhere": "nowhere is no model: it does not exist",
    "domain=own out=a_file/kept": "a_file is no directory that can be written to: give another out=",
    "domain=own out=taken": "taken.svg is a link or a directory: give another out=",
    "domain=own device=tpu": "device must be one of auto, cpu, cuda",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(evaluate, run, tmp_path, mistake):
    (tmp_path / "a_file").write_text("mine")
    (tmp_path / "taken.svg").mkdir()
    code, out, err = evaluate(f"checkpoint={run}", *mistake.split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert MISTAKES[mistake] in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a_file", "taken.svg"]


def test_a_domain_for_what_needs_none_is_refused(evaluate, submodels):
    code, _, err = evaluate(f"checkpoint={submodels}/ships", "domain=ships")
    assert code == 2
    assert "no model given routes by domain" in err


def test_another_tokenizer_is_refused(evaluate, dataset, submodels, tmp_path):
    copy = shutil.copytree(submodels / "ships", tmp_path / "copy")
    (copy / "tokenizer.json").write_bytes((dataset / "tokenizer.json").read_bytes() + b"\n")
    assert "copy has another tokenizer than" in evaluate("checkpoint=copy")[2]
    (copy / "tokenizer.json").unlink()
    code, _, err = evaluate("checkpoint=copy")
    assert code == 2
    assert "copy has no tokenizer.json" in err


def test_different_lengths_need_one(evaluate, run, submodels, tmp_path):
    copy = shutil.copytree(submodels / "ships", tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    models = [f"checkpoint=[{submodels}/recipes,copy]"]
    code, _, err = evaluate(*models)
    assert code == 2
    assert "trained on sequences of 32, 64 tokens, but all get the same text: give sequence_length=" in err
    assert evaluate(*models, "sequence_length=32", "check=false")[0] == 0
    code, _, err = evaluate(*models, "sequence_length=32")  # the config was changed by hand
    assert code == 2 and "copy/config.json has" in err


def test_text_that_the_model_never_saw(evaluate, measured, run, dataset, tmp_path):
    """A dataset whose second domain has another name, of the same tokenizer."""
    copy = shutil.copytree(dataset, tmp_path / "renamed")
    manifest = (copy / "dataset.json").read_text().replace('"ships', '"boats')
    (copy / "dataset.json").write_text(manifest)
    for path in copy.glob("ships.*"):
        path.rename(path.with_name(path.name.replace("ships", "boats")))
    code, _, err = evaluate(f"checkpoint={run}", "domain=own", "dataset=renamed")
    assert code == 2
    assert "knows no domain 'boats', only recipes, ships: leave it out of texts=, or give domain=auto, all" in err
    auto = cells(measured(f"checkpoint={run}", "domain=auto", "dataset=renamed"))["auto, 64 tokens"]["boats"]
    assert auto["right"] is None
    assert sum(auto["taken"].values()) == auto["documents"] > 0
