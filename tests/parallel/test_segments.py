"""Runs of canonical tensors in intervals: each element once, read exactly, and moved as LocalEngine moves it."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmoe.moe.canonical import canonical_tensors, expected_shapes
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.parallel.config import ParallelConfig
from sigmoe.parallel.costs import footprint
from sigmoe.parallel.engine import OptimizerConfig
from sigmoe.parallel.local import LocalEngine
from sigmoe.parallel.mesh import Axis, Mesh, single_mesh
from sigmoe.parallel.segments import Interval, SegmentAdamW, find_segments, read_segment
from sigmoe.parallel.shards import Sharding
from sigmoe.parallel.traffic import MicroBatch, step_traffic

CONFIG = ModelConfig(
    vocab_size=31, dim=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, expert_dim=10, ffn_dim=6,
    sparse_layers="upper:1", qk_norm="width", init_std=0.2,
    router=RouterConfig(name="domain_top_k", sets={"a": (0, 1, 2), "b": (2, 3)}),
)  # fmt: skip
REGISTRY = CONFIG.build_registry(("a", "b"))


def mesh_of(dp=1, tp=1, ep=1, etp=1, rank=(0, 0, 0, 0)):
    """A mesh without groups; rank: in tp, ep, etp and dp."""
    alone = Axis(group=None, rank=0, size=1)
    axes = {"tp": (rank[0], tp), "ep": (rank[1], ep), "etp": (rank[2], etp), "dp": (rank[3], dp)}
    return Mesh(
        world=alone,
        edp=Axis(group=None, rank=0, size=max(dp * tp // (ep * etp), 1)),
        **{name: Axis(group=None, rank=place, size=size) for name, (place, size) in axes.items()},
    )


def local_parameters(sharding):
    with torch.device("meta"):
        model = Transformer(CONFIG, REGISTRY)
    return {n: torch.empty(sharding.local_shape(n, tuple(p.shape)), device="meta") for n, p in model.named_parameters()}


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(0, 6000), max_size=6), tp=st.sampled_from([1, 2]))
def test_every_element_is_in_one_segment(cuts, tp):
    held = {}
    for rank in range(tp):
        mesh = mesh_of(tp=tp, etp=tp, rank=(rank, 0, rank, 0))
        sharding = Sharding(CONFIG, REGISTRY, mesh)
        parameters = local_parameters(sharding)
        total = sum(parameter.numel() for parameter in parameters.values())
        edges = sorted({0, total, *(cut for cut in cuts if cut < total)})
        for first, last in pairwise(edges):
            for segment in find_segments(parameters.items(), sharding, mesh, first, last):
                assert segment.offset >= 0
                assert segment.offset + segment.end - segment.begin <= last - first
                if segment.counted:
                    box = held.setdefault(segment.shard.name, torch.zeros(segment.shard.shape))
                    part = segment.shard.part(box)
                    flat = part.flatten()
                    flat[segment.begin : segment.end] += 1
                    part.copy_(flat.view_as(part))
    shapes = {n: s for n, s in expected_shapes(CONFIG, REGISTRY).items() if not n.endswith(("table", "bias"))}
    assert held.keys() == shapes.keys()
    assert all(bool((count == 1).all()) for count in held.values())


class Source:
    def __init__(self, tensors):
        self.tensors = tensors

    def read_slice(self, name, slices):
        return self.tensors[name][tuple(slices)].contiguous()


@settings(deadline=None, max_examples=40)
@given(first=st.integers(0, 3000), size=st.integers(1, 900), rank=st.integers(0, 1))
def test_a_segment_is_read_from_its_rows(first, size, rank):
    whole = {n: torch.randn(s) for n, s in expected_shapes(CONFIG, REGISTRY).items()}
    mesh = mesh_of(tp=2, etp=2, rank=(rank, 0, rank, 0))
    sharding = Sharding(CONFIG, REGISTRY, mesh)
    for segment in find_segments(local_parameters(sharding).items(), sharding, mesh, first, first + size):
        name = segment.shard.name
        expected = segment.shard.part(whole[name]).flatten()[segment.begin : segment.end]
        assert torch.equal(read_segment(Source(whole), segment, name), expected)


def test_whole_segments_move_bit_for_bit_as_in_one_process():
    model = Transformer(CONFIG, REGISTRY)
    initialize(model, 0)
    config = OptimizerConfig(lr=1e-2, clip_norm=0.5)
    mesh, sharding = single_mesh(), Sharding(CONFIG, REGISTRY, single_mesh())
    parameters = dict(model.named_parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    ours = SegmentAdamW([Interval(flat, find_segments(parameters.items(), sharding, mesh, 0, flat.numel()))], config)
    engine = LocalEngine(model, config)
    for step in range(3):
        for name, parameter in parameters.items():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step + len(name)))
        gradient = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
        trains = (lambda name: "experts.2" in name) if step == 1 else (lambda name: True)
        engine.train_only(trains)
        norm = engine.step(1e-2).grad_norm
        assert float(ours.square_sum([gradient], trains).sqrt()) == pytest.approx(norm, rel=1e-7)
        ours.update([gradient], 1e-2, min(1.0, 0.5 / norm), trains)
    theirs = canonical_tensors(model)
    for piece in ours.held_masters():
        assert torch.equal(piece.tensor.view(piece.box_shape), theirs[piece.name]), piece.name
    state = engine.named_state().optimizer
    for piece in ours.held_moments():
        assert torch.equal(piece.tensor.view(piece.shape), state[piece.name].read()), piece.name


def test_bytes_follow_the_layout():
    one = footprint(CONFIG, REGISTRY, single_mesh(), ParallelConfig(), torch.float32)
    total = sum(parameter.numel() for parameter in Transformer(CONFIG, REGISTRY).parameters())
    # An fp32 parameter that one process has is its own master.
    assert (one.parameters, one.gradients, one.optimizer) == (4 * total, 4 * total, 8 * total)
    four = mesh_of(dp=4)
    assert footprint(CONFIG, REGISTRY, four, ParallelConfig(), torch.float32).optimizer == pytest.approx(
        3 * total, rel=0.01
    )
    narrow = footprint(CONFIG, REGISTRY, four, ParallelConfig(zero_stage=2), torch.bfloat16, accumulation=2)
    assert narrow.parameters == pytest.approx(2 * total, rel=0.02)
    assert narrow.gradients == pytest.approx(2 * total + total, rel=0.02)


def test_bytes_sent_follow_the_layout():
    """Against sums by hand; what torch.distributed really gets is counted in tests/distributed."""
    total = sum(parameter.numel() for parameter in Transformer(CONFIG, REGISTRY).parameters())
    sent = sent_by(mesh_of(dp=4), tokens=7)
    assert sent["dp", "all_reduce"] + sent["edp", "all_reduce"] == 4 * total
    assert sent["dp", "all_gather"] + sent["edp", "all_gather"] == pytest.approx(4 * total, rel=0.01)
    assert sent["world", "all_reduce"] == 16
    assert sent_by(mesh_of(), tokens=7) == {}
    # One of two layers is sparse, top-2 of 3 + 1 experts, 12 wide: rows out and back, their gradients; counts.
    spread = sent_by(mesh_of(dp=2, ep=2), tokens=7)
    assert spread["ep", "all_to_all"] == 4 * (7 * 2) * 12 * 4 + 2 * 3 * 8
    # Embedding and head, two layers' attention with QK-norm, one dense layer; a maximum, a sum and a logit a token.
    hidden, head = 16 * 12 * 4, 3 * 16 * 4
    cut = sent_by(mesh_of(tp=2, etp=1), tokens=16)
    assert cut["tp", "all_reduce"] == 2 * hidden + head + 2 * (2 * hidden + 4 * 16 * 4) + 2 * hidden
    assert cut["tp", "all_gather"] == 2 * hidden + 16 * 2 * 4
    parts = sent_by(mesh_of(tp=2, etp=2), tokens=16)
    assert parts["etp", "all_reduce"] == cut["tp", "all_gather"]


def sent_by(mesh, tokens):
    """What one micro-batch of a step sends where experts get equal shares."""
    mesh = dataclasses.replace(mesh, world=dataclasses.replace(mesh.world, size=mesh.dp.size * mesh.tp.size))
    micro = MicroBatch.balanced(CONFIG, mesh, tokens)
    return step_traffic(CONFIG, REGISTRY, mesh, ParallelConfig(), torch.float32, [micro])
