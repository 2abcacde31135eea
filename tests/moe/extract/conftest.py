"""Parents with random weights on disk, and submodels cut out of them into a folder in memory."""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from sigmoe.moe.canonical import canonical_tensors
from sigmoe.moe.config import ModelConfig
from sigmoe.moe.extract import Extraction, Submodel, SubmodelWriter, plan_submodel
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.moe.parsing import to_mapping
from sigmoe.moe.route_table import fill_route_tables
from sigmoe.moe.storage.checkpoint import CheckpointContent, write_checkpoint
from sigmoe.moe.storage.durable import durable_directory
from sigmoe.moe.storage.tensors import named_tensors
from sigmoe.moe.stored import StoredModel, open_model, open_unfinished

# dim * expert_dim is no multiple of 4: an expert lies aligned differently in the submodel's stack, and the bits of a
# product with one or two rows would show it. The init_std lets routing vary by token. The vocabulary is larger than
# the tokenizer's.
SHAPE = {
    "vocab_size": 331,
    "dim": 22,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 6,
    "expert_dim": 19,
    "ffn_dim": 18,
    "sparse_layers": "upper:2",
    "init_std": 0.3,
}


class Cut(NamedTuple):
    """A submodel that was written: its plan, what was kept, and the model as it lies on disk."""

    plan: Submodel
    extraction: Extraction
    stored: StoredModel


@pytest.fixture(scope="session")
def folder():
    """Return a new folder at each call, in memory where there is one: thousands of fsyncs cost nothing there."""
    shm = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        yield lambda: Path(tempfile.mkdtemp(dir=name))


@pytest.fixture(scope="session")
def model_config():
    """Return a config of the shape above with `changes`."""
    return lambda router, **changes: ModelConfig(**{**SHAPE, **changes, "router": router})


@pytest.fixture(scope="session")
def write_parent(dataset, folder):
    """Write a checkpoint of random weights, norms, selection biases and route tables; returns it opened."""
    tokenizer = (dataset / "tokenizer.json").read_bytes()

    def write(config, names=("recipes", "ships"), path=None):
        model = Transformer(config, config.build_registry(tuple(names)))
        initialize(model, 0)
        random = torch.Generator().manual_seed(0)
        counts = {name: torch.randint(0, 9, (config.vocab_size,), generator=random) for name in names}
        fill_route_tables(model, counts, 0)
        tensors = canonical_tensors(model)
        for name, tensor in tensors.items():
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5, generator=random)
            if name.endswith("bias"):
                tensor.normal_(std=0.2, generator=random)
        content = CheckpointContent(
            model=named_tensors(tensors),
            optimizer={},
            state={"step": 7},
            config={"model": to_mapping(config), "sequence_length": 32},
            registry=model.registry.to_json(),
            tokenizer=tokenizer,
            hf_config=None,
        )
        path = path or folder() / "parent"
        write_checkpoint(path, content)
        return open_model(path)

    return write


@pytest.fixture(scope="session")
def cut(folder):
    """Cut `domains` out of a parent; returns the Cut."""

    def run(parent, *domains, **options):
        plan, path = plan_submodel(parent.config, parent.registry, domains), folder() / "submodel"
        with durable_directory(path) as directory:
            extraction = SubmodelWriter(parent, plan, **options).write(directory)
        return Cut(plan, extraction, open_unfinished(path))

    return run
