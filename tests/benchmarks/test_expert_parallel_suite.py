import json

import pytest

from sigmoe.benchmarks.expert_parallel import ExpertParallelSettings, combined, run_suite, start_ranks
from sigmoe.benchmarks.train_worker import WorkerAnswer
from sigmoe.moe.config import ModelConfig, RouterConfig


def settings(router=None, **changes):
    router = router or RouterConfig(name="top_k", num_experts=4, auxiliary_loss=0.0)
    sizes = {"vocab_size": 50, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "expert_dim": 8}
    model = ModelConfig(**sizes, router=router)
    small = {"batch": 4, "sequence_length": 8, "rounds": 1, "steps": 1, "warmup": 1, "allocators": ("default",)}
    return ExpertParallelSettings(model=model, **{**small, "stages": (1,), **changes})


def test_ranks_make_one_answer():
    first = WorkerAnswer(seconds=(1.0, 4.0), loss=0.25, peak_bytes=7, matmul={"torch.mm": 2.0})
    second = WorkerAnswer(seconds=(3.0, 2.0), loss=0.5, peak_bytes=5, matmul={"torch.mm": 3.0})
    whole = WorkerAnswer(seconds=(3.0, 4.0), loss=0.75, peak_bytes=7, matmul={"torch.mm": 5.0})
    assert combined([first, second]) == whole


def test_contenders_train_the_same_model_on_the_same_batch():
    pytest.importorskip("deepspeed")
    pytest.importorskip("megatron.core")
    # The balance losses differ in kind, so there are none; with DeepSpeed's layer the model computes what ours does.
    chosen = settings(peers=("deepspeed dropless torch",))
    table = run_suite(chosen)
    assert [row[0] for row in table.rows] == list(chosen.contenders.values())
    rounds = json.loads(table.to_json())["rounds"]["default"]
    ours, deepspeed = (rounds[name][0]["loss"] for name in chosen.contenders)
    assert ours == pytest.approx(deepspeed, rel=1e-6)
    assert all(row[5].endswith("x") == (row[0] != "sigmoe, ZeRO 1") for row in table.rows)


def test_a_rank_that_fails_says_why():
    pytest.importorskip("deepspeed")
    with (
        pytest.raises(OSError, match=r"measuring deepspeed quick torch failed: .*'quick'"),
        start_ranks("deepspeed quick torch", settings(peers=()), raised=False),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"stages": ()}, "stages, allocators not empty"),
        ({"ranks": 1}, "ranks must be at least 2"),
        ({"ranks": 3}, r"divide batch \(4\)"),
        ({"ranks": 4, "router": RouterConfig(name="top_k", num_experts=6)}, "divide the experts"),
        ({"router": RouterConfig(name="domain_top_k", sets=4)}, "peers need router=top_k"),
        ({"peers": ("deepspeed quick torch",)}, "is not 'deepspeed dropless"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
