import json

import pytest
import torch

from sigmoe.benchmarks.loss import COLUMNS, OURS, Case, LossBenchSettings, check_losses, rows_of, step_config
from sigmoe.benchmarks.loss_head import LossShape, build_loss, draw
from sigmoe.benchmarks.memory import allocated_peak, step_memory
from sigmoe.benchmarks.passes import PassAnswer
from sigmoe.launch.main import main

SHAPE = LossShape(tokens=12, dim=16, vocab_size=37)


def test_contenders_compute_the_same():
    inputs = draw(SHAPE, torch.device("cpu"), torch.float32)
    assert (inputs.label_T == -100).sum() == 2
    results = {}
    for name in ("sigmoe", "whole", "checkpointed", "torch"):
        if name == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
            continue
        loss = build_loss(name, inputs)()
        results[name] = [loss, *torch.autograd.grad(loss, (inputs.x_TD, inputs.weight_VD))]
    for name, tensors in results.items():
        for got, want in zip(tensors, results["sigmoe"], strict=True):
            torch.testing.assert_close(got, want, msg=name)
    with pytest.raises(ValueError, match="not nobody"):
        build_loss("nobody", inputs)


def test_the_peak_is_that_of_the_allocator():
    kept = []

    def work():
        kept.append(torch.empty(1000))
        gone = torch.empty(500)
        del gone
        torch.empty(300)
        torch.arange(200.0).exp_()

    assert allocated_peak(work) == 4 * 1500
    assert allocated_peak(lambda: torch.ones(8, 8) @ torch.ones(8, 8)) >= 3 * 256


def test_a_training_step_holds_little_more_than_it_must(capsys):
    memory = step_memory(step_config(32768), 4096)
    with capsys.disabled():
        print(f"\na training step, S 4096, V 32,768: {memory}")
    assert 0.9 < memory.peak / memory.formula < 1.1
    # Logits of all tokens alone would be more.
    assert memory.peak < 4 * 4096 * 32768


def test_rows():
    ours = [PassAnswer(forward=(1.0,), backward=(1.0,), kept_bytes=10**6, peak_bytes=2 * 10**6)]
    peer = [PassAnswer(forward=(1.0, 9.0, 2.0), backward=(3.0, 9.0, 3.0))]
    rounds = {OURS: ours, "whole": peer, "machine": [PassAnswer(matmul_rate=SHAPE.flops)]}
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in rows_of(Case(shape=SHAPE, allocator="raised"), rounds)]
    assert [row["sigmoe is"] for row in rows] == ["", "2.50x"]
    assert [row["of limit"] for row in rows] == ["50%", "20%"]
    assert (rows[0]["tokens, D, V"], rows[0]["ms"], rows[0]["kept MB"], rows[0]["peak MB"]) == (
        "12 16 37",
        "2000.0",
        "1.0",
        "2.0",
    )


def test_a_different_loss_is_refused():
    rounds = {OURS: [PassAnswer(norm=2.0)], "whole": [PassAnswer(norm=2.000001)], "machine": [PassAnswer()]}
    check_losses(rounds, "cpu")
    for norm in (2.1, float("nan")):
        with pytest.raises(OSError, match="whole computes something else"):
            check_losses(rounds | {"whole": [PassAnswer(norm=norm)]}, "cpu")


def test_the_suite_by_the_command(tmp_path, capsys):
    small = ["rounds=2", "steps=1", "warmup=1", "threads=1", "allocators=[raised]", "peers=[whole]"]
    small += ["step_tokens=64", "step_vocab_size=300", "shapes=[{tokens: 12, dim: 16, vocab_size: 37}]"]
    command = ["bench", "suite=loss", *(f"loss.{word}" for word in small), f"out={tmp_path}/loss"]
    assert main(command) == 0
    assert "12 16 37" in capsys.readouterr().out
    record = json.loads((tmp_path / "loss.json").read_text())
    (case,) = record["cases"]
    assert set(case["rounds"]) == {"sigmoe", "whole", "machine"}
    assert all(answer["peak_bytes"] > 0 for name in ("sigmoe", "whole") for answer in case["rounds"][name])
    assert record["step"]["peak"] > record["step"]["kept"] > 0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        LossBenchSettings(rounds=0)
    with pytest.raises(ValueError, match="allocators must not be empty"):
        LossBenchSettings(allocators=())
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        LossShape(tokens=1, dim=1, vocab_size=0)
