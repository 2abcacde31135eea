import json
from typing import get_args

import pytest
import torch

from sigmoe.benchmarks.norm import Case, NormBenchSettings, rows_of
from sigmoe.benchmarks.norm_operation import NormShape, Operation, build, draw
from sigmoe.benchmarks.passes import PassAnswer, measure
from sigmoe.launch.main import main

SHAPE = NormShape(tokens=12, dim=16, head_dim=4)
CPU = torch.device("cpu")


@pytest.mark.parametrize("operation", get_args(Operation))
def test_contenders_compute_the_same(operation):
    inputs = draw(operation, SHAPE, CPU, torch.float32)
    results = []
    for name in ("sigmoe", "eager"):
        out = build(name, inputs)()
        outs = out if isinstance(out, tuple) else (out,)
        results.append([*outs, *torch.autograd.grad(outs, inputs.leaves, [one.detach() for one in outs])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_what_must_be_moved():
    # Rows in and out of a forward, and of a backward, where the gradients are as large as what they belong to.
    for operation in get_args(Operation):
        inputs = draw(operation, SHAPE, CPU, torch.float32)
        rows = [x.numel() for x in inputs.leaves[: len(inputs.leaves) - len(inputs.weights)]]
        out = build("sigmoe", inputs)()
        given = sum(x.numel() for x in (out if isinstance(out, tuple) else (out,)))
        forward, backward = SHAPE.elements(operation)
        assert forward == sum(rows) + given
        # The residual sum is read in place of its two inputs, which share a gradient.
        assert backward == (2 * sum(rows) + given if operation != "add_rms_norm" else sum(rows) + given)


def test_several_outputs_are_measured():
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    answer = measure(lambda: (x * 1, x * 12 / 5), [x], CPU, 2)
    assert answer.norm == pytest.approx(13)
    assert len(answer.forward) == len(answer.backward) == 2 and min(answer.forward + answer.backward) > 0


def test_rates():
    forward, backward = (4 * size for size in SHAPE.elements("rms_norm"))
    ours = PassAnswer(forward=(1e-6,), backward=(4e-6,), kept_bytes=10**6)
    peer = PassAnswer(forward=(2e-6,), backward=(2e-6,))
    machine = PassAnswer(copy_rate=2e6 * forward)
    rounds = {"sigmoe": [ours], "eager": [peer], "machine": [machine]}
    first, second = rows_of(Case(operation="rms_norm", shape=SHAPE), rounds, 4)
    rates = f"{forward / 1e3:.3g}", "50%", f"{backward / 4e3:.3g}", "19%"
    assert first == ("sigmoe", "rms_norm", "12 16 4", "0.001", "0.004", "", "", "", *rates, "1.0")
    assert second[5:8] == ("2.00x", "0.50x", "0.80x")


def test_the_suite_by_the_command(tmp_path, capsys):
    small = ["norm.rounds=2", "norm.steps=1", "norm.warmup=1", "norm.threads=1", "norm.operations=[add_rms_norm]"]
    shape = "norm.shapes=[{tokens: 12, dim: 16, head_dim: 4}]"
    assert main(["bench", "suite=norm", *small, shape, "norm.peers=[eager]", f"out={tmp_path}/norm"]) == 0
    assert "12 16 4" in capsys.readouterr().out
    (case,) = json.loads((tmp_path / "norm.json").read_text())["cases"]
    assert case["operation"] == "add_rms_norm" and set(case["rounds"]) == {"sigmoe", "eager", "machine"}
    # The sum and a number a row.
    assert {answer["kept_bytes"] for answer in case["rounds"]["sigmoe"]} == {4 * (12 * 16 + 12)}


def test_mistakes_are_named():
    for name in ("rounds", "steps", "warmup", "threads"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            NormBenchSettings(**{name: 0})
    with pytest.raises(ValueError, match=r"of eager and compiled, got \['liger'\]"):
        NormBenchSettings(peers=("liger",))
    with pytest.raises(ValueError, match="operations must not be empty"):
        NormBenchSettings(operations=())
    with pytest.raises(ValueError, match="multiple of head_dim, and head_dim even, got 16, 5"):
        NormShape(tokens=1, dim=16, head_dim=5)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        NormShape(tokens=0, dim=16, head_dim=4)
