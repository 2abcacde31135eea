import json

import pytest

from sigmoe.benchmarks.generate import OURS, GenerateBenchSettings, check_texts, run_suite, speed_ratio
from sigmoe.benchmarks.generate_worker import GenerateAnswer
from sigmoe.launch.main import main
from sigmoe.moe.config import ModelConfig, RouterConfig


def settings(**changes):
    sizes = {"vocab_size": 50, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "expert_dim": 8}
    router = changes.pop("router", RouterConfig(name="top_k", num_experts=4))
    small = {"batches": (1, 3), "shortest": 2, "longest": 6, "new_tokens": 5, "rounds": 1, "threads": 1}
    return GenerateBenchSettings(**{**small, "model": ModelConfig(**sizes, init_std=0.3, router=router), **changes})


def answers(*seconds, texts=((1, 2),)):
    return [GenerateAnswer(seconds=(second,), texts=texts, peak_bytes=1) for second in seconds]


def test_the_ratio_is_taken_inside_each_round():
    assert speed_ratio(answers(1.0, 10.0, 2.0), answers(2.0, 30.0, 3.0)) == 2.0


def test_another_text_is_an_error():
    same = {OURS: answers(1.0), "eager": answers(2.0)}
    check_texts(same)
    with pytest.raises(OSError, match="eager writes another text than sigmoe: prompt 0, token 1"):
        check_texts(same | {"eager": answers(2.0, texts=((1, 3),))})
    for length in (1, 3):
        place = min(length, 2)
        with pytest.raises(OSError, match=f"prompt 0, token {place}"):
            check_texts(same | {"eager": answers(2.0, texts=((1, 2, 3)[:length],))})


def test_both_write_the_same_texts():
    pytest.importorskip("transformers")
    table = run_suite(settings(peers=("eager",)))
    assert [row[:2] for row in table.rows] == [
        *((OURS, "1"), ("transformers, eager", "1")),
        *((OURS, "3"), ("transformers, eager", "3")),
    ]
    assert [row[5].endswith("x") for row in table.rows] == [False, True] * 2
    record = json.loads(table.to_json())
    assert record["rounds"]["3"]["eager"][0]["peak_bytes"] > 1e6


def test_the_command(tmp_path, capsys):
    small = ["model=tiny", "model.vocab_size=40", "generate.rounds=1", "generate.new_tokens=2", "generate.threads=1"]
    peers = ["generate.peers=[]", "generate.batches=[2]"]
    assert main(["bench", "suite=generate", *small, *peers, f"out={tmp_path}/speed"]) == 0
    assert "vocabulary 40" in capsys.readouterr().out
    assert (tmp_path / "speed.md").read_text().startswith("# Greedy generation on a CPU\n\n| contender | batch |")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"longest": 1}, "longest must be at least shortest"),
        ({"batches": ()}, "batches a list of at least 1 each"),
        ({"router": RouterConfig(name="rre", sets=2, top_k=1, balance="none")}, "the model must be a Mixtral"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        run_suite(settings(**changes))
