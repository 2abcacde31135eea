"""Tiny checkpoints of random weights."""

import pytest

from sigmoe.moe.canonical import canonical_tensors
from sigmoe.moe.config import ModelConfig
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.moe.parsing import to_mapping
from sigmoe.moe.storage.checkpoint import CheckpointContent, write_checkpoint
from sigmoe.moe.storage.tensors import named_tensors

SHAPE = {"vocab_size": 300, "dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "expert_dim": 48}


@pytest.fixture(scope="session")
def write_model(dataset, tmp_path_factory):
    """Write a checkpoint of random weights; returns its path."""

    def write(router, names=("any",), **changes):
        config = ModelConfig(router=router, **(SHAPE | {"init_std": 0.3} | changes))
        model = Transformer(config, config.build_registry(names))
        initialize(model, 0)
        content = CheckpointContent(
            model=named_tensors(canonical_tensors(model)),
            optimizer={},
            state={"step": 3},
            config={"model": to_mapping(config), "sequence_length": 32},
            registry=model.registry.to_json(),
            tokenizer=(dataset / "tokenizer.json").read_bytes(),
            hf_config=None,
        )
        path = tmp_path_factory.mktemp("models") / "parent"
        write_checkpoint(path, content)
        return path

    return write
