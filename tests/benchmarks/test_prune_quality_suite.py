"""The study of pruning criteria on tiny runs: everything is measured, and the table says what was measured."""

import json
import math
from pathlib import Path

import pytest

from sigmoe.benchmarks import prune_fit
from sigmoe.benchmarks.prune_fit import fit_forecast, forecast_notes
from sigmoe.benchmarks.prune_quality import PruneQualitySettings, quality_rows, run_names
from sigmoe.benchmarks.prune_study import Outcome, Study
from sigmoe.launch.main import main
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.data.loader import heldout_batches
from sigmoe.moe.prune.criteria import CRITERIA
from sigmoe.moe.prune.forecast import expected
from sigmoe.moe.stored import load_model, open_model

QUICK = ["evaluate.every=0", "model.sparse_layers=all", "steps=2", "schedule.warmup_steps=1"]
TOKENS = ["prune_quality.calibrate_tokens=96", "prune_quality.evaluate_tokens=128"]


def outcome(**changes):
    values = {
        "run": "a",
        "domain": "ships",
        "criterion": "reap",
        "pruned": 0.5,
        "whole": 2.0,
        "added": math.log(1.5),
        "dropped": 0.2,
        "forecast": math.log(1.25),
        "outside": 2.0,
    }
    return Outcome(**(values | changes))


def losses(run, path):
    """Held-out losses of the whole model in memory."""
    dataset, model = open_dataset(path), load_model(open_model(next(Path(run, "checkpoints").glob("step-*"))))
    means = {}
    for name in dataset.domain_names:
        (batch,) = heldout_batches(dataset, name, batch_size=4, sequence_length=32, max_tokens=128)
        loss = model(batch.token_BS, start_BS=batch.start_BS, domain_B=batch.domain_B, label_BS=batch.label_BS).loss_sum
        means[name] = float(loss) / batch.num_labels
    return means


def test_every_criterion_is_measured_for_every_domain(train, dataset, tmp_path):
    top_k = ["router=top_k", "router.num_experts=4", "router.sets=null"]
    assert train(*QUICK, *top_k, "out=top4") == 0
    assert train(*QUICK, "out=sets2") == 0
    keys = [f"prune_quality.dataset={dataset}", "prune_quality.runs=[top4]", "prune_quality.exact=[sets2]"]
    keys += ["prune_quality.others=[top4]", "prune_quality.pruned=[0.25,0.5]", *TOKENS, f"out={tmp_path}/quality"]
    keys += ["prune_quality.fitted=1"]
    assert main(["bench", "suite=prune_quality", *keys]) == 0
    record = json.loads((tmp_path / "quality.json").read_text())
    outcomes = record["outcomes"]
    assert len(outcomes) == 2 * 2 * 2 * len(CRITERIA)  # runs, domains, budgets
    assert sum(each["outside"] is None for each in outcomes) == len(outcomes) / 2
    assert {each["run"] for each in outcomes} == {"top4 (1)", "top4 (2)"}
    table = (tmp_path / "quality.md").read_text()
    assert "of top4 (1) by criteria of data that added loss: " in table
    assert all(f"| {criterion} |" in table for criterion in CRITERIA)
    whole = losses("top4", dataset)
    assert {each["domain"]: each["whole"] for each in outcomes} == pytest.approx(whole, rel=1e-5)
    assert any(each["added"] != 0 for each in outcomes)
    (exact,) = record["exact_losses"]
    assert exact == pytest.approx(losses("sets2", dataset), rel=1e-5)


def test_runs_that_cannot_stand_in_one_table(train, dataset, capsys, monkeypatch):
    top_k = ["router=top_k", "router.sets=null"]
    for number in (4, 3):
        assert train(*QUICK, *top_k, f"router.num_experts={number}", f"out=top{number}") == 0
    assert train(*QUICK, "out=sets2") == 0
    monkeypatch.setattr(Study, "outcomes", lambda *args, **keys: pytest.fail("it measures first"))
    for keys, words in (
        (["runs=[top4,top3]"], "runs: top3 has another shape than top4: name it in others"),
        (["runs=[top4]", "others=[sets2]"], "its router is domain_top_k"),
        (["runs=[top4]", "exact=[top4]"], "its router is top_k"),
        (["runs=[top4]", "exact=[sets2]", "pruned=[0.25]"], "which no fraction of pruned leaves"),
    ):
        given = [f"prune_quality.{key}" for key in (f"dataset={dataset}", *keys)]
        assert main(["bench", "suite=prune_quality", *given]) == 2
        assert words in capsys.readouterr().err


def test_rows_are_means_over_runs_and_domains():
    outcomes = [outcome(), outcome(run="b", added=math.log(2.5), outside=4.0), outcome(criterion="gate", pruned=0.25)]
    assert quality_rows([0.5], outcomes[:2]) == (("reap", "2.00 ± 0.71", "3.00 ± 1.41"),)


def test_the_forecast_is_compared_in_points():
    assert expected(0.2).low < math.log(1.35) < expected(0.2).high < math.log(1.5)
    (note,) = forecast_notes([outcome(), outcome(added=math.log(1.35)), outcome(criterion="weight", added=5.0)])
    assert note.startswith("forecast of a, ") and note.endswith("50%: 17.5, 17.5, 25.0, 50%")


def test_the_fit_is_that_of_a_line():
    made = [outcome(dropped=share, added=1.5 * share**1.25) for share in (0.1, 0.2, 0.4, 0.8)]
    fit = fit_forecast([*made, outcome(added=-0.1), outcome(criterion="weight", added=9.0)])
    assert (fit.scale, fit.power, fit.factor) == (pytest.approx(1.5), pytest.approx(1.25), pytest.approx(1))
    assert fit.prunings == 4
    off = [outcome(dropped=0.3, added=2.0**power) for power in range(-5, 5)] + [outcome(dropped=0.6, added=2**-0.5)]
    assert fit_forecast(off).factor == pytest.approx(2**4.5)  # ten of eleven
    with pytest.raises(ValueError, match="cannot be fitted"):
        fit_forecast(made[:1] * 3)


def test_the_constants_are_those_of_the_stored_outcomes():
    record = json.loads(Path(prune_fit.__file__).with_name("results").joinpath("prune-quality.json").read_text())
    outcomes = [Outcome(**each) for each in record["outcomes"]]
    fitted = list(dict.fromkeys(each.run for each in outcomes))[: record["settings"]["fitted"]]
    fit = fit_forecast([each for each in outcomes if each.run in fitted])
    assert expected(1.0).added == round(fit.scale, 2)
    assert math.log(expected(1.0).added / expected(0.5).added, 2) == pytest.approx(round(fit.power, 2))
    assert expected(1.0).high / expected(1.0).added == pytest.approx(round(fit.factor, 2))
    assert all(each.forecast == expected(each.dropped).added for each in outcomes)
    table = Path(prune_fit.__file__).with_name("results").joinpath("prune-quality.md").read_text()
    assert all(f"- {note}\n" in table for note in forecast_notes(outcomes))


def test_equal_last_parts_are_told_apart():
    assert run_names(["a/s0", "b/s1", "c/s0/"]) == ["s0 (1)", "s1", "s0 (3)"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threads": 0}, "threads must be at least 1"),
        ({"pruned": (1.0,)}, "pruned must be fractions between 0 and 1"),
        ({"runs": ("a",), "exact": ("b", "c")}, "exact must name none or 1"),
        ({"runs": ("a",), "fitted": 2}, "fitted must be from 0 to 1"),
    ],
)
def test_settings_that_measure_nothing(settings, words):
    with pytest.raises(ValueError, match=words):
        PruneQualitySettings(**settings)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([], "prune_quality.dataset is missing"),
        (["prune_quality.dataset={dataset}"], "prune_quality.runs is missing"),
        (["prune_quality.dataset={dataset}", "prune_quality.runs=[nowhere]"], "nowhere holds no checkpoint"),
    ],
)
def test_what_is_missing_is_named(keys, words, dataset, capsys):
    assert main(["bench", "suite=prune_quality", *(key.format(dataset=dataset) for key in keys)]) == 2
    assert words in capsys.readouterr().err
