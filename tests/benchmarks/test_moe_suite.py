import json

import pytest
import torch

from sigmoe.benchmarks.moe import COLUMNS, OURS, Case, MoeBenchSettings, check_outputs, rows_of
from sigmoe.benchmarks.moe_layer import MoeShape, build_layer, draw
from sigmoe.benchmarks.passes import PassAnswer, kept_bytes, speed_ratios
from sigmoe.launch.main import main

SHAPE = MoeShape(tokens=12, dim=16, expert_dim=32, experts=4, top_k=2)
CPU = torch.device("cpu")


def test_loads():
    shape = MoeShape(tokens=400, dim=16, expert_dim=16, experts=8, top_k=2)
    count = {
        load: torch.bincount(shape.route(load).flatten(), minlength=8) for load in ("uniform", "zipf", "hot", "empty")
    }
    for load, count_E in count.items():
        assert count_E.sum() == 800, load
        assert (shape.route(load).sort(-1).values.diff() > 0).all()
    assert count["uniform"].min() > 60 and count["uniform"].max() < 140
    assert count["zipf"][0] > 2 * count["zipf"][7] > 0
    assert count["hot"][0] == 400
    assert count["empty"][:4].min() > 0 and count["empty"][4:].sum() == 0


def test_what_must_be_moved():
    # Of the experts a half: their weights are read forward and backward, and their gradients written.
    T, D, F, R = 12, 16, 32, 24
    forward, backward = 2 * T * D + 2 * R * D + 4 * R * F, 4 * T * D + 2 * R * D + 10 * R * F
    assert SHAPE.pass_elements("empty") == forward + backward + 2 * 9 * D * F
    assert SHAPE.forward_flops == 6 * R * D * F


def test_tile_efficiency():
    # By hand: 200 rows of the first expert take 2 blocks of 128, 1 to 128 rows of another take 1.
    shape = MoeShape(tokens=200, dim=16, expert_dim=16, experts=4, top_k=2)
    count_E = shape.count("hot").tolist()
    assert count_E[0] == 200 and sum(count_E) == 400 and all(0 < count <= 128 for count in count_E[1:])
    assert shape.tile_efficiency("hot") == 400 / (5 * 128)
    taken = [PassAnswer(forward=(1.0,), backward=(1.0,))]
    rounds = {OURS: taken, "dense": taken, "machine": [PassAnswer(matmul_rate=1.0, copy_rate=1.0)]}
    rows = rows_of(Case(shape=shape, load="hot", allocator="raised"), rounds, 4)
    assert [dict(zip(COLUMNS, row, strict=True))["tiles"] for row in rows] == ["62%", ""]


def test_contenders_compute_the_same():
    pytest.importorskip("transformers")
    inputs = draw(SHAPE, "uniform", CPU, torch.float32)
    results = {}
    for name in ("sigmoe", "grouped_linear", "eager", "grouped_mm"):
        layer = build_layer(name, inputs)
        out = layer.forward()
        results[name] = [out, *torch.autograd.grad(out, layer.leaves, torch.ones_like(out))]
    for name, tensors in results.items():
        for got, want in zip(tensors, results["sigmoe"], strict=True):
            torch.testing.assert_close(got, want, msg=name)


def test_what_a_forward_keeps():
    # Whole allocations, each once: the factor, of which a half is used, and the answer of exp. Weights do not count.
    weights, factor = torch.arange(6.0, requires_grad=True), torch.arange(8.0)

    def forward():
        return (weights[:4] * factor[:4]).exp()

    assert kept_bytes(forward, [factor, weights]) == 4 * 4
    assert kept_bytes(forward, [weights]) == 4 * (8 + 4)


def test_a_different_output_is_refused():
    rounds = {OURS: [PassAnswer(norm=2.0)], "eager": [PassAnswer(norm=2.00001)], "dense": [PassAnswer(norm=9.0)]}
    check_outputs(rounds, "cpu")
    for norm in (2.1, float("nan")):
        with pytest.raises(OSError, match="eager computes something else"):
            check_outputs(rounds | {"eager": [PassAnswer(norm=norm)]}, "cpu")


def test_ratios_are_taken_inside_each_round():
    ours = [
        PassAnswer(forward=(1.0, 1.0, 9.0), backward=(2.0, 2.0, 2.0)),
        PassAnswer(forward=(10.0,), backward=(20.0,)),
    ]
    peer = [PassAnswer(forward=(2.0,), backward=(8.0,)), PassAnswer(forward=(20.0,), backward=(80.0,))]
    assert speed_ratios(ours, peer) == pytest.approx((2, 4, 10 / 3))


def test_the_suite_by_the_command(tmp_path, capsys):
    shape = "{tokens: 12, dim: 16, expert_dim: 32, experts: 4, top_k: 2}"
    small = [
        "moe.rounds=2",
        "moe.steps=1",
        "moe.warmup=1",
        "moe.threads=1",
        "moe.allocators=[raised]",
        "moe.loads=[hot]",
    ]
    command = ["bench", "suite=moe", *small, f"moe.shapes=[{shape}]", "moe.peers=[dense]", f"out={tmp_path}/moe"]
    assert main(command) == 0
    assert "12 16 32 4 2" in capsys.readouterr().out
    (case,) = json.loads((tmp_path / "moe.json").read_text())["cases"]
    assert case["load"] == "hot" and set(case["rounds"]) == {"sigmoe", "dense", "machine"}
    assert all(answer["kept_bytes"] > 0 for answer in case["rounds"]["sigmoe"])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        MoeBenchSettings(rounds=0)
    with pytest.raises(ValueError, match="loads and allocators must not be empty"):
        MoeBenchSettings(loads=())
    with pytest.raises(ValueError, match=r"top_k must be at most half the experts \(4\), got 3"):
        MoeShape(tokens=1, dim=1, expert_dim=1, experts=4, top_k=3)
