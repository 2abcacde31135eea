import json

import pytest
import torch

from sigmoe.benchmarks.attention import OURS, AttentionBenchSettings, check_outputs, rows_of
from sigmoe.benchmarks.attention_case import AttentionCase, draw
from sigmoe.benchmarks.attention_peers import contender
from sigmoe.benchmarks.passes import PassAnswer
from sigmoe.launch.main import main

CPU = torch.device("cpu")
FORMS = "causal", "documents", "window", "gqa", "mqa"


def case(form="causal", **sizes):
    return AttentionCase(**{"form": form, "length": 20, "tokens": 40, "heads": 8, "width": 4, "window": 6} | sizes)


@pytest.mark.parametrize("form", FORMS)
def test_contenders_compute_the_same(form):
    results = {}
    for name in (OURS, "sdpa"):
        inputs = draw(case(form), CPU, torch.float32)
        out = contender(name, inputs)()
        results[name] = [out, *torch.autograd.grad(out, inputs.leaves, torch.ones_like(out))]
    for got, want in zip(results["sdpa"], results[OURS], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_pairs_and_tiles():
    assert case().pairs() == 2 * 20 * 21 // 2
    assert case("window").pairs() == 2 * (6 * 7 // 2 + 14 * 6)
    documents = case("documents")
    lengths = torch.diff(torch.tensor([*(documents.start() == torch.arange(20)).flatten().nonzero().flatten(), 40]))
    assert lengths.max() <= 5 and len(lengths) > 8
    assert documents.pairs() == int((lengths * (lengths + 1) // 2).sum())
    # Blocks of 8 queries end at 8, 16 and 20, their blocks of 4 keys begin at 0, and with a window of 6 at 0, 0 and 8.
    assert case().tile_pairs(8, 4, together=False) == 2 * (8 * 8 + 8 * 16 + 4 * 20)
    assert case("window").tile_pairs(8, 4, together=True) == 2 * (8 * 8 + 8 * 16 + 4 * 12)
    apart, together = (documents.tile_pairs(4, 1, together=one) for one in (False, True))
    assert documents.pairs() < apart < together


def test_flops_and_bytes():
    # By hand: 420 pairs and 8 heads of width 4; 40 tokens with q and output of 8 heads, k and v of 1.
    assert case().flops() == (4 * 8 * 4 * 420, 10 * 8 * 4 * 420)
    assert case("mqa").moved_bytes(2) == (2 * 2 * 40 * 4 * 9 + 4 * 40 * 8, 2 * (2 * 2 * 40 * 4 * 9 + 4 * 40 * 8))


def test_the_table():
    ours, peer = PassAnswer(forward=(1.0,), backward=(4.0,)), PassAnswer(forward=(2.0,), backward=(6.0,))
    machine = PassAnswer(matmul_rate=case().flops()[0] * 2, copy_rate=1e12)
    rows = rows_of(case(), {OURS: [ours], "sdpa": [peer], "machine": [machine]}, "cpu")
    assert [row[:3] for row in rows] == [(OURS, "causal", "20"), ("sdpa", "causal", "20")]
    assert rows[1][5:8] == ("2.00x", "1.50x", "1.60x")
    assert rows[0][10:13] == ("50%", "31%", "52%") and rows[1][10:13] == ("25%", "21%", "")


def test_a_different_output_is_refused():
    rounds = {OURS: [PassAnswer(norm=2.0)], "machine": [PassAnswer()]}
    check_outputs(rounds | {"sdpa": [PassAnswer(norm=2.00001)]}, "cpu")
    for norm in (2.1, float("nan")):
        with pytest.raises(OSError, match="sdpa computes something else"):
            check_outputs(rounds | {"sdpa": [PassAnswer(norm=norm)]}, "cpu")


def test_the_suite_by_the_command(tmp_path, capsys):
    sizes = "attention.lengths=[20]", "attention.tokens=40", "attention.heads=8", "attention.width=4"
    small = "attention.forms=[window]", "attention.rounds=2", "attention.steps=1", "attention.warmup=1"
    peers = "attention.peers=[sdpa,flash]", "attention.window=6", "attention.threads=1"
    assert main(["bench", "suite=attention", *sizes, *small, *peers, f"out={tmp_path}/attention"]) == 0
    # A contender that has no way to a form is named.
    assert "left out, window of 20: measuring flash failed: ValueError: no window" in capsys.readouterr().out
    (measured,) = json.loads((tmp_path / "attention.json").read_text())["cases"]
    assert measured["form"] == "window" and set(measured["rounds"]) == {OURS, "sdpa", "machine"}
    assert all(len(answers) == 2 for answers in measured["rounds"].values())


def test_mistakes_are_named():
    for wrong, words in (
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"forms": ()}, "forms must not be empty"),
    ):
        with pytest.raises(ValueError, match=words):
            AttentionBenchSettings(**wrong)
    for wrong, words in (
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"length": 30}, r"length must divide tokens \(40\), got 30"),
        ({"form": "gqa", "heads": 12}, "heads must be a multiple of 8 for the form gqa, got 12"),
    ):
        with pytest.raises(ValueError, match=words):
            case(**wrong)
