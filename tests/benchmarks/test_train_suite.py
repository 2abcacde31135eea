import json

import pytest

from sigmoe.benchmarks.table import BenchTable
from sigmoe.benchmarks.train import TrainBenchSettings, run_suite, speed_ratio
from sigmoe.benchmarks.train_step import StepShape, build_step
from sigmoe.benchmarks.train_worker import WorkerAnswer, WorkerRequest
from sigmoe.benchmarks.worker import Worker
from sigmoe.moe.config import ModelConfig, RouterConfig


def model(**changes):
    router = changes.pop("router", RouterConfig(name="top_k", num_experts=4))
    sizes = {"vocab_size": 50, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "expert_dim": 8}
    return ModelConfig(**sizes, router=router, **changes)


def settings(**changes):
    small = {"batch": 2, "sequence_length": 8, "rounds": 2, "steps": 1, "warmup": 1, "threads": 1}
    return TrainBenchSettings(model=model(), **{**small, **changes})


def answers(*rounds):
    return [WorkerAnswer(seconds=seconds) for seconds in rounds]


def test_the_ratio_is_taken_inside_each_round():
    ours, peer = answers((1.0, 1.0, 9.0), (10.0,), (2.0,)), answers((2.0,), (20.0, 20.0), (3.0,))
    assert speed_ratio(ours, peer) == 2.0


def test_our_step_learns():
    step = build_step("sigmoe", StepShape(model=model(), batch=2, sequence_length=8))
    losses = [step(number) for number in range(20)]
    assert losses[-1] < losses[0]


def test_a_suite_without_peers():
    seen = []
    table = run_suite(settings(peers=(), allocators=("default",)), lambda *stage: seen.append(stage))
    assert [row[:2] for row in table.rows] == [("sigmoe", "default")]
    assert all(figure for figure in table.rows[0][2:5])
    assert seen == [("rounds, malloc default", done, 2) for done in range(3)]
    record = json.loads(table.to_json())
    rounds = record["rounds"]["default"]
    assert len(rounds["sigmoe"]) == len(rounds["matmul"]) == 2
    assert rounds["sigmoe"][0]["peak_bytes"] > 1e6
    assert set(rounds["matmul"][0]["matmul"]) == {"torch.mm", "product"}
    assert {"CPU", "torch", "commit"} <= set(record["machine"])


def test_both_contenders_train_the_same_shape():
    pytest.importorskip("transformers")
    table = run_suite(settings(peers=("eager",), rounds=1, allocators=("raised",)))
    assert [row[:2] for row in table.rows] == [("sigmoe", "raised"), ("transformers, eager", "raised")]
    # Two steps from random weights: both losses are near that of equal logits, log(50) = 3.9.
    assert all(3 < float(row[-1]) < 5 for row in table.rows)
    assert all(row[5].endswith("x") == (row[0] != "sigmoe") for row in table.rows)


def test_a_worker_that_fails_says_why():
    request = WorkerRequest(
        contender="no such implementation",
        shape=StepShape(model=model(), batch=1, sequence_length=4),
        threads=1,
        raise_thresholds=False,
        warmup=1,
    )
    pytest.importorskip("transformers")
    with pytest.raises(OSError, match=r"measuring no such implementation failed: .*no such implementation"):
        Worker("train_worker", request, WorkerAnswer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"allocators": ()}, "allocators not empty"),
        ({"model": model(qk_norm="head")}, "peers are Mixtrals"),
        ({"model": model(router=RouterConfig(name="domain_top_k", sets=2))}, "peers are Mixtrals"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainBenchSettings(**{"model": model(), **changes})


def test_markdown():
    table = BenchTable(
        title="T", columns=("a", "b"), rows=(("x", "1"),), notes=("n",), machine={"CPU": "c"}, record={"raw": [1]}
    )
    assert table.to_markdown() == (
        "# T\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n\n- n\n\n| measured on | |\n|---|---|\n| CPU | c |\n"
    )
    assert json.loads(table.to_json()) == {"title": "T", "machine": {"CPU": "c"}, "raw": [1]}
