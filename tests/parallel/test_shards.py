"""Shards of every rank of a mesh, made without processes: together they are the model, each element once."""

import itertools

import pytest
import torch

from sigmoe.moe.canonical import canonical_tensors, expected_shapes
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.parallel.materialize import cut_parameters, materialize
from sigmoe.parallel.mesh import Axis, Mesh, single_mesh
from sigmoe.parallel.shards import Sharding, shards

NAMES = ("a", "b")
DOMAIN = RouterConfig(name="domain_top_k", sets={"a": (0, 1, 2), "b": (2, 3, 4)}, balance="bias")
TABLE = RouterConfig(name="rre", sets=2, top_k=1, balance="none")
SHAPE = {"vocab_size": 37, "dim": 18, "num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "head_dim": 4}
SIZES = {"expert_dim": 12, "ffn_dim": 8, "sparse_layers": "upper:2"}

MODELS = {
    "head": {"router": DOMAIN, "qk_norm": "head"},
    "width": {"router": DOMAIN, "qk_norm": "width", "tie_embeddings": True},
    "slots": {"router": TABLE, "embedding_slots": {"a": 0, "b": 1}},
}


def meshes(*, dp=1, tp=1, ep=1, etp=1):
    """Every rank's mesh of a layout, numbered as Megatron-Core does: tensor ranks next to each other."""
    world = dp * tp
    for rank in range(world):
        expert = rank // etp
        yield Mesh(
            world=Axis(group=None, rank=rank, size=world),
            dp=Axis(group=None, rank=rank // tp, size=dp),
            tp=Axis(group=None, rank=rank % tp, size=tp),
            ep=Axis(group=None, rank=expert % ep, size=ep),
            etp=Axis(group=None, rank=rank % etp, size=etp),
            edp=Axis(group=None, rank=expert // ep, size=world // (ep * etp)),
        )


def built(config, mesh):
    registry = config.build_registry(NAMES)
    sharding = Sharding(config, registry, mesh)
    with torch.device("meta"):
        model = Transformer(config, registry)
    cut_parameters(model, sharding)
    materialize(model, sharding, seed=3, device=torch.device("cpu"))
    return model


LAYOUTS = [{}, {"tp": 2, "etp": 2}, {"tp": 4, "ep": 4}, {"dp": 2, "tp": 2, "ep": 2, "etp": 2}, {"dp": 4, "ep": 2}]


@pytest.mark.parametrize(("kind", "layout"), list(itertools.product(MODELS, LAYOUTS)))
def test_together_they_are_the_model_and_each_element_has_one_first_holder(kind, layout):
    config = ModelConfig(**SHAPE, **SIZES, **MODELS[kind])
    registry = config.build_registry(NAMES)
    one = Transformer(config, registry)
    initialize(one, 3)
    wanted = canonical_tensors(one)
    seen = {name: torch.zeros(shape) for name, shape in expected_shapes(config, registry).items()}
    for mesh in meshes(**layout):
        for name, shard in shards(built(config, mesh), mesh).items():
            assert shard.name == name
            assert shard.shape == tuple(wanted[name].shape)
            assert torch.equal(shard.tensor, shard.part(wanted[name]))
            assert torch.equal(shard.tensor, wanted[name][shard.slices])
            shard.part(seen[name]).add_(int(shard.first(mesh)))
    assert [name for name, count in seen.items() if not bool((count == 1).all())] == []


def test_a_shard_is_a_view():
    config = ModelConfig(**SHAPE, **SIZES, **MODELS["head"])
    mesh = next(iter(meshes(dp=2, tp=2, ep=2, etp=2)))
    model = built(config, mesh)
    held = shards(model, mesh)
    held["model.layers.1.block_sparse_moe.experts.2.w3.weight"].tensor.fill_(7)
    held["model.layers.0.mlp.up_proj.weight"].tensor.fill_(8)
    assert bool((model.model.layers[1].block_sparse_moe.experts.gate_up[1, 6:] == 7).all())
    assert bool((model.model.layers[0].mlp.gate_up[4:] == 8).all())
    assert "model.layers.1.block_sparse_moe.experts.1.w3.weight" not in held


def test_whose_gradients_are_summed():
    config = ModelConfig(**SHAPE, **SIZES, **MODELS["head"])
    mesh = next(iter(meshes(dp=2, tp=2, ep=2, etp=2)))
    held = shards(built(config, mesh), mesh)
    experts = {name for name, shard in held.items() if shard.data_axis == "edp"}
    assert experts == {name for name in held if ".experts." in name}
    whole = {name for name, shard in held.items() if shard.replicated}
    assert whole == {name for name in held if name.endswith(("norm.weight", "gate.weight", "bias"))}


def test_padding_of_the_vocabulary_is_zero_and_in_no_shard():
    config = ModelConfig(**SHAPE, **SIZES, **MODELS["head"])
    *_, mesh = meshes(tp=4, ep=1, etp=4)
    model = built(config, mesh)
    assert model.lm_head.weight.shape == (10, 18)
    assert shards(model, mesh)["lm_head.weight"].tensor.shape == (7, 18)
    assert not model.lm_head.weight[7:].any()


def test_one_process_holds_everything():
    config = ModelConfig(**SHAPE, **SIZES, **MODELS["slots"])
    held = shards(built(config, single_mesh()), single_mesh())
    assert all(shard.dim is None and shard.first(single_mesh()) and not shard.replicated for shard in held.values())
