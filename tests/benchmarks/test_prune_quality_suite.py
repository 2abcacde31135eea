"""The study of pruning criteria on tiny runs: everything is measured, and the table says what was measured."""

import json
import math
from pathlib import Path

import pytest

from sigmoe.benchmarks.prune_quality import PruneQualitySettings, forecast_notes, quality_rows
from sigmoe.benchmarks.prune_study import Outcome
from sigmoe.launch.main import main
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.data.loader import heldout_batches
from sigmoe.moe.prune.criteria import CRITERIA
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
    assert main(["bench", "suite=prune_quality", *keys]) == 0
    record = json.loads((tmp_path / "quality.json").read_text())
    outcomes = record["outcomes"]
    assert len(outcomes) == 2 * 2 * 2 * len(CRITERIA)  # runs, domains, budgets
    assert sum(each["outside"] is None for each in outcomes) == len(outcomes) / 2
    table = (tmp_path / "quality.md").read_text()
    assert all(f"| {criterion} |" in table for criterion in CRITERIA)
    whole = losses("top4", dataset)
    assert {each["domain"]: each["whole"] for each in outcomes} == pytest.approx(whole, rel=1e-5)
    assert any(each["added"] != 0 for each in outcomes)
    (exact,) = record["exact_losses"]
    assert exact == pytest.approx(losses("sets2", dataset), rel=1e-5)


def test_rows_are_means_over_runs_and_domains():
    outcomes = [outcome(), outcome(run="b", added=math.log(2.5), outside=4.0), outcome(criterion="gate", pruned=0.25)]
    assert quality_rows([0.5], outcomes[:2]) == (("reap", "2.00 ± 0.71", "3.00 ± 1.41"),)


def test_the_forecast_is_compared_in_points():
    (note,) = forecast_notes([outcome(), outcome(added=math.log(1.35)), outcome(criterion="weight", added=5.0)])
    assert note.startswith("forecast of a, ") and note.endswith("50%: 17.5, 17.5, 25.0")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threads": 0}, "threads must be at least 1"),
        ({"pruned": (1.0,)}, "pruned must be fractions between 0 and 1"),
        ({"runs": ("a",), "exact": ("b", "c")}, "exact must name none or 1"),
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
