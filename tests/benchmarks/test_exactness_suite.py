import json

import pytest

from sigmoe.benchmarks.exactness import ExactnessSettings, expert_sets
from sigmoe.launch.main import main

SMALL = ["exactness.dim=16", "exactness.expert_dim=16", "exactness.experts=3", "exactness.tokens=200"]


def test_every_domain_of_every_model_is_cut_out(dataset, tmp_path, capsys):
    assert main(["bench", "suite=exactness", f"exactness.dataset={dataset}", *SMALL, f"out={tmp_path}/exact"]) == 0
    told = "12 of 12 submodels give their parent's logits with all bits equal, 2,400 held-out tokens compared"
    assert told in capsys.readouterr().out
    outcomes = json.loads((tmp_path / "exact.json").read_text())["outcomes"]
    assert {outcome["max_abs_difference"] for outcome in outcomes} == {0.0}
    made = {(outcome["router"], outcome["sets"]): outcome["format"] for outcome in outcomes}
    learned, table = ({kind: made[router, kind] for kind in ("disjoint", "one")} for router in ("domain_top_k", "rre"))
    assert (learned, table) == ({"disjoint": "mixtral", "one": "mistral"}, {"disjoint": "sigmoe", "one": "mistral"})
    assert len({(outcome["router"], outcome["sets"], outcome["domain"]) for outcome in outcomes}) == 12


def test_sets_of_experts():
    names = ("a", "b", "c")
    assert expert_sets("disjoint", names, 2) == {"a": (0, 1), "b": (2, 3), "c": (4, 5)}
    assert expert_sets("overlapping", names, 3) == {"a": (0, 1, 2), "b": (2, 3, 4), "c": (0, 4, 5)}
    assert expert_sets("one", names, 3) == {"a": (0,), "b": (1,), "c": (2,)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokens": 0}, "tokens and threads must be at least 1"),
        ({"top_k": 4}, "top_k must lie between 2 and experts - 1, got 4 of 4"),
    ],
)
def test_settings_that_make_no_model(settings, words):
    with pytest.raises(ValueError, match=words):
        ExactnessSettings(**settings)


def test_a_dataset_is_needed(capsys):
    assert main(["bench", "suite=exactness"]) == 2
    assert capsys.readouterr().err.startswith("sigmoe bench: exactness.dataset is missing")
