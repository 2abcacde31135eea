"""Calibration text: every token once, domains in equal shares, documents bounded; bad files are named."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.prune.calibrate import calibrate
from sigmoe.moe.prune.prunable import check_prunable
from sigmoe.moe.prune.text import dataset_text, jsonl_text


@pytest.fixture(scope="module")
def model(hf_model):
    return hf_model("mixtral")[1]


def batches(text):
    return [text.batch(index) for index in range(len(text))]


def documents(text):
    """The pieces of documents, as tuples of ids."""
    return [
        tuple(token_S[start_S == start].tolist())
        for batch in batches(text)
        for token_S, start_S in zip(batch.token_BS, batch.start_BS)
        for start in start_S.unique()
    ]


@pytest.mark.parametrize(("tokens", "length", "size"), [(500, 32, 4), (501, 33, 3), (64, 64, 1), (7, 64, 2)])
def test_no_token_is_padding_and_none_comes_twice(model, dataset, tokens, length, size):
    prepared = open_dataset(dataset)
    text = dataset_text(model, prepared, tokens=tokens, sequence_length=length, batch_size=size)
    all_batches = batches(text)
    assert sum(batch.token_BS.numel() for batch in all_batches) == text.description["tokens"] == tokens // 2 * 2
    assert text.description["domains"] == {"recipes": tokens // 2, "ships": tokens // 2}
    assert all(batch.token_BS.shape[0] <= size and batch.token_BS.shape[1] <= length for batch in all_batches)
    for batch in all_batches:
        position_BS = torch.arange(batch.token_BS.shape[1])
        assert (batch.start_BS <= position_BS).all()
        first = (batch.start_BS == position_BS) & (position_BS > 0)  # after a document's end
        assert (batch.token_BS[:, :-1][first[:, 1:]] == prepared.end_of_text).all()


def test_all_of_a_small_domain_is_taken_once(model, dataset):
    prepared = open_dataset(dataset)
    number = prepared.domain("ships").train.num_tokens
    text = dataset_text(model, prepared, domains=["ships"], tokens=10**9, sequence_length=50)
    assert text.description["tokens"] == number
    counts = torch.bincount(torch.cat([batch.token_BS.flatten() for batch in batches(text)]), minlength=300)
    assert torch.equal(counts, prepared.token_counts("ships"))


def test_a_seed_chooses(model, dataset, jsonl):
    prepared = open_dataset(dataset)
    for make in (lambda seed: dataset_text(model, prepared, tokens=200, seed=seed, sequence_length=40),
                 lambda seed: jsonl_text(model, jsonl, tokens=200, seed=seed, sequence_length=40)):  # fmt: skip
        one, again, other = (documents(make(seed)) for seed in (1, 1, 2))
        assert one == again != other


def test_rows_are_tokenised_as_the_model_does(model, jsonl):
    tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    text = jsonl_text(model, jsonl, domains=["law"], tokens=10**6, sequence_length=10**5)
    expected = {(*tokenizer.encode(row["text"]).ids, 0) for row in rows if row.get("domain") == "law"}
    found = documents(text)
    assert set(found) == expected and len(found) == 24
    assert jsonl_text(model, jsonl, domains=["any"], tokens=9).description["domains"] == {"any": 9}
    assert set(jsonl_text(model, jsonl, tokens=100).description["domains"]) == {"any", "law", "recipes", "ships"}


def test_the_default_length_is_the_models(model, jsonl):
    assert jsonl_text(model, jsonl, tokens=100).description["sequence_length"] == 64
    longer, unknown = replace(model, sequence_length=10**5), replace(model, sequence_length=None)
    assert jsonl_text(longer, jsonl, tokens=100).description["sequence_length"] == 2048
    assert jsonl_text(unknown, jsonl, tokens=100).description["sequence_length"] == 2048


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ('{"text": "a"}\n', {"domains": ["law"]}, "has no text of domain 'law', only of any"),
        ('{"text": "a"}\n', {"domains": ["any", "any"]}, "name each domain once"),
        ('{"text": "a"}\n', {"tokens": 0}, "tokens must be at least 1 a domain"),
        ('{"text": "a"}\n\n{"text": 3}\n', {}, "line 3: field 'text' is not text but int"),
        ('{"txt": "a"}\n', {}, "line 1: no field 'text' .fields: txt."),
        ('{"text": "a", "domain": ["x"]}\n', {}, "line 1: domain must be a name"),
        ("[1]\n", {}, "line 1: not a JSON object but list"),
        ("{\n", {}, "line 1: not a JSON object"),
        (b'{"text": "\xff"}\n', {}, "not UTF-8 at byte 10"),
        ("\n", {}, "holds no row"),
        (None, {}, "cannot be read: No such file"),
    ],
)
def test_bad_rows_are_named(model, tmp_path, rows, options, words):
    path = tmp_path / "rows.jsonl"
    if rows is not None:
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    with pytest.raises(ValueError, match=words):
        jsonl_text(model, path, **{"tokens": 9, **options})


def test_models_that_cannot_read_it(model, jsonl, dataset):
    with pytest.raises(ValueError, match="has no tokenizer"):
        jsonl_text(replace(model, tokenizer=None), jsonl, tokens=9)
    with pytest.raises(ValueError, match="unknown domain 'law'; known domains: recipes, ships"):
        dataset_text(model, open_dataset(dataset), domains=["law"], tokens=9)


def test_only_models_with_one_learned_gate_are_pruned(model, jsonl, tmp_path):
    shape = {"vocab_size": 31, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "expert_dim": 8}
    for router, names, words in (
        (RouterConfig(name="rre", sets=2, top_k=1, balance="none"), ("a",), "its router is rre"),
        (
            RouterConfig(name="domain_top_k", sets=2),
            ("a", "b"),
            "domain_top_k with 2 domains.*extract one domain first",
        ),
    ):
        config = ModelConfig(**shape, router=router)
        with pytest.raises(ValueError, match=words):
            check_prunable(config, config.build_registry(names))
    dense = replace(model, config=replace(model.config, sparse_layers="none"))
    with pytest.raises(ValueError, match="it has no sparse layer"):
        calibrate(dense, jsonl_text(model, jsonl, tokens=9), tmp_path / "work")
