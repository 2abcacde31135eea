"""`sigmoe convert router=`: a sparse model whose logits at step 0 are its dense parent's, for the three routers."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

from sigmoe.launch.main import main
from sigmoe.moe.canonical import canonical_tensors, expert_of
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.moe.parsing import to_mapping
from sigmoe.moe.route_table import build_route_row
from sigmoe.moe.storage.checkpoint import CheckpointContent, open_checkpoint, write_checkpoint
from sigmoe.moe.storage.tensors import named_tensors
from sigmoe.moe.stored import load_model, open_model

VOCABULARY = 280  # of the parent; the dataset's tokenizer knows 300 ids, of which these are the first
SHAPE = {
    "vocab_size": VOCABULARY,
    "dim": 22,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 6,
    "expert_dim": 9,
    "ffn_dim": 19,
    "sparse_layers": "none",
    "init_std": 0.3,
    "router": RouterConfig(name="top_k", num_experts=1, top_k=1),
}
ROUTERS = {
    "top_k": ["router=top_k", "router.num_experts=5", "router.top_k=3"],
    "top_k, all of them, as the softmax weighs": ["router=top_k", "router.num_experts=2", "router.renormalize=false"],
    "top_k with a bias": ["router=top_k", "router.num_experts=4", "router.balance=bias", "sparse_layers=every:2"],
    "domain_top_k": ["router=domain_top_k", "router.sets={recipes: 3, ships: 2}", "sparse_layers=upper:2"],
    "domain_top_k with slots": ["router=domain_top_k", "router.sets=2", "embedding_slots={ships: 1}"],
    "sets of one": ["router=domain_top_k", "router.sets=1", "router.top_k=1"],
    "rre": ["router=rre", "router.sets=3", "embedding_slots={ships: 1}", "sparse_layers=upper:1"],
}


@pytest.fixture(scope="module")
def room():
    shm = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def write_dense(room):
    """Write a dense checkpoint of random weights, once; returns its path."""

    def write(name, tokenizer, **changes):
        if (room / name).exists():
            return room / name
        config = ModelConfig(**SHAPE | changes)
        model = Transformer(config, config.build_registry(("any",)))
        initialize(model, 0)
        random = torch.Generator().manual_seed(0)
        tensors = canonical_tensors(model)
        for key, tensor in tensors.items():
            if key.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5, generator=random)
        content = CheckpointContent(
            model=named_tensors(tensors),
            optimizer={},
            state={"step": 7},
            config={"model": to_mapping(config), "sequence_length": 32},
            registry=model.registry.to_json(),
            tokenizer=tokenizer,
            hf_config=None,
        )
        write_checkpoint(room / name, content)
        return room / name

    return write


@pytest.fixture(scope="module")
def shorter(dataset):
    """The dataset's tokenizer without its last merges."""
    data = json.loads((dataset / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    data["model"]["vocab"] = {text: id for text, id in vocabulary.items() if id < VOCABULARY}
    data["model"]["merges"] = [pair for pair in data["model"]["merges"] if vocabulary["".join(pair)] < VOCABULARY]
    return json.dumps(data).encode()


@pytest.fixture(scope="module", params=["untied", "tied"])
def dense(request, write_dense, shorter):
    return write_dense(request.param, shorter, tie_embeddings=request.param == "tied")


def inherit(model, out, *settings):
    threads = torch.get_num_threads()
    try:
        return main(["convert", f"model={model}", f"out={out}", *settings, "threads=1"])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=ROUTERS)
def inherited(request, dense, dataset, room):
    """(the dense parent, the sparse model)"""
    out = room / f"{dense.name}-{request.param}".replace(" ", "-").replace(",", "")
    assert inherit(dense, out, *ROUTERS[request.param], f"dataset={dataset}") == 0
    return open_model(dense), open_model(out)


@torch.no_grad()
def test_step_0_is_the_parent(inherited):
    parent, child = inherited
    token_BS = torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    dense_BSV = load_model(parent)(token_BS).logits_BSV
    sparse = load_model(child)
    for domain in child.registry.domains:
        sparse_BSV = sparse(token_BS, domain_B=torch.full((3,), domain.id)).logits_BSV
        assert sparse_BSV.shape[-1] == 300
        difference = (sparse_BSV[..., :VOCABULARY] - dense_BSV).abs().max() / dense_BSV.abs().max()
        assert float(difference) < 1e-5
    report = json.loads((child.path / "conversion.json").read_text())
    assert report["logits"]["max_relative_difference"] < 1e-5


def test_what_is_copied_and_what_is_drawn(inherited, dataset):
    parent, child = inherited
    prepared = open_dataset(dataset)
    fresh = set()
    for name in child.tensors.names():
        tensor = child.tensors.read(name)
        if expert_of(name) is not None:
            layer, kind = expert_of(name)[0], {"w1": "gate", "w2": "down", "w3": "up"}[name.split(".")[-2]]
            assert torch.equal(tensor, parent.tensors.read(f"model.layers.{layer}.mlp.{kind}_proj.weight")), name
        elif name.endswith("gate.route_table"):
            layer = int(name.split(".")[2])
            for row, domain in enumerate(child.registry.names):
                assert torch.equal(tensor[row], build_route_row(prepared.token_counts(domain), 3, 0, layer, domain))
        elif name.endswith("bias"):
            assert not tensor.any()
        elif ".block_sparse_moe." in name:
            fresh.add(tensor.numpy().tobytes())
            assert 0.15 < float(tensor.std()) < 0.45
        elif name.startswith(("model.embed_tokens", "lm_head")):
            source = "lm_head.weight" if name.startswith("lm_head") else "model.embed_tokens.weight"
            assert torch.equal(tensor[:VOCABULARY], parent.tensors.read(source))
            fresh.add(tensor[VOCABULARY:].numpy().tobytes())
            assert 0.25 < float(tensor[VOCABULARY:].std()) < 0.35
        else:
            assert torch.equal(tensor, parent.tensors.read(name)), name
    drawn = [n for n in child.tensors.names() if n.endswith("gate.weight") or "embed_tokens" in n or "lm_head" in n]
    assert len(fresh) == len(drawn)


@pytest.mark.parametrize("router", ["top_k", "rre"])
def test_training_goes_on_from_it(write_dense, dataset, room, router, train):
    tokenizer = (dataset / "tokenizer.json").read_bytes()
    changes = {"vocab_size": 300, "dim": 16, "ffn_dim": 16, "num_heads": 4, "head_dim": None, "num_layers": 2}
    parent = write_dense(f"whole-{router}", tokenizer, **changes)
    settings = [f"router={router}", *(["router.num_experts=3"] if router == "top_k" else [])]
    out = room / f"begin-{router}"
    assert inherit(parent, out, *settings, "router.sets=2" if router == "rre" else "seed=3", f"dataset={dataset}") == 0
    shape = ["model.ffn_dim=16", "~router.sets" if router == "top_k" else "router.sets=2", *settings]
    command = [*shape, f"initial={out}", "steps=1", "optim.lr=1e-30", "optim.weight_decay=0", "out=run"]
    assert train(*command) == 0
    begun, trained = open_model(out).tensors, open_checkpoint(Path("run/checkpoints/step-00000001")).model
    assert all(torch.equal(begun.read(name), trained.read(name)) for name in begun.names())


def test_the_same_inheritance_twice(write_dense, shorter, dataset, room, capsys):
    dense = write_dense("untied", shorter, tie_embeddings=False)
    out, settings = room / "twice", [*ROUTERS["rre"], f"dataset={dataset}"]
    assert inherit(dense, out, *settings) == 0
    assert inherit(dense, out, *settings) == 0
    assert "holds this very conversion already" in capsys.readouterr().err
    assert inherit(dense, out, *settings, "seed=1") == 2
    assert "made of this model with inherits.seed=0: remove it" in capsys.readouterr().err


def test_bf16_stays_bf16(write_dense, shorter, room):
    parent = room / "bf16"
    assert inherit(write_dense("untied", shorter, tie_embeddings=False), parent, "to=sigmoe", "dtype=bf16") == 0
    assert inherit(parent, room / "bf16-sparse", "router=top_k", "router.num_experts=2") == 0
    child = open_model(room / "bf16-sparse")
    assert {child.tensors.dtype(name) for name in child.tensors.names()} == {torch.bfloat16}
    assert child.registry.names == ("any",)


MISTAKES = {
    "router.top_k=1": "router.top_k=1 weighs a token's expert with less than 1, so step 0 would not be the parent's",
    "router.renormalize=false": "router.renormalize=false gives a token's experts weights that do not sum to 1",
    "router=rre": "router=rre builds its tables from how often tokens occur: give dataset=",
    "domains=null": "router=domain_top_k routes by domain: give domains=[...] or dataset=",
    "sparse_layers=none": "sparse_layers=none leaves nothing to inherit into",
    "sparse_layers=upper:9": "sparse_layers must be all, none, every:N or upper:N with N up to 3",
    "embedding_slots={c: 1}": "unknown domain 'c'",
    "dataset=nowhere": "domains and dataset both name the domains: give one of them",
    "to=mixtral": "router= writes sigmoe's format, parameters as they are",
    "dtype=bf16": "router= writes sigmoe's format, parameters as they are",
    "router.sets=0": "sets must be at least 1",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(write_dense, shorter, tmp_path, capsys, mistake):
    assert (
        inherit(
            write_dense("untied", shorter, tie_embeddings=False),
            tmp_path / "out",
            "router=domain_top_k",
            "domains=[a,b]",
            mistake,
        )
        == 2
    )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sigmoe convert: ")]
    assert MISTAKES[mistake] in line
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_refused(write_dense, shorter, dataset, tmp_path, capsys):
    swapped = shorter.replace(b'"<|padding|>"', b'"<|other|>"')
    parent = write_dense("swapped", swapped)
    assert inherit(parent, tmp_path / "out", "router=top_k", f"dataset={dataset}") == 2
    line = capsys.readouterr().err
    assert "has another tokenizer than" in line and "'<|other|>'" in line
