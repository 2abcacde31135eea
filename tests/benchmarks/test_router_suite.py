import json
import math

import pytest

from sigmoe.benchmarks.router_runs import CONTENDERS, RouterBenchSettings, RunResult, finished_run
from sigmoe.benchmarks.routers import MEAN, best_rate, choose_rates, paired, spread, table_rows
from sigmoe.launch.main import main
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.data.progress import no_progress

SMALL = {"steps": 2, "batch": 2, "sequence_length": 16, "dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
SMALL |= {"expert_dim": 8, "evaluate_tokens": 64}


def words(data, runs, **changes):
    keys = {**SMALL, "dataset": data, "runs": runs, "seeds": [0], **changes}
    return ["bench", "suite=routers", *(f"routers.{key}={value}" for key, value in keys.items())]


def settings(**changes):
    return RouterBenchSettings(**{**SMALL, **changes})


def result(a, b, **changes):
    sizes = {"load": 1.5, "total": 1000, "active": 100, "submodel": 500}
    return RunResult(**{"loss": {"a": a, "b": b}, "bits_per_byte": {"a": a / 2, "b": b / 2}, **sizes, **changes})


@pytest.fixture(scope="module")
def suite(dataset, tmp_path_factory):
    """The folder of a finished suite: out.md, out.json and runs/."""
    folder = tmp_path_factory.mktemp("suite")
    assert main([*words(dataset, folder / "runs"), f"out={folder}/out"]) == 0
    return folder


def test_every_contender_trains_the_same_number_of_tokens(suite):
    names = sorted(path.name.split("-")[0] for path in (suite / "runs").iterdir())
    assert names == sorted(CONTENDERS)
    for run in (suite / "runs").iterdir():
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert max(step.get("tokens", 0) for step in steps) == 2 * 2 * 16


def test_contenders_are_equal_in_what_a_token_passes(suite):
    runs = {name: by_seed["0"] for name, by_seed in json.loads((suite / "out.json").read_text())["runs"].items()}
    gate = 16  # weights of one expert's row, one layer
    assert runs["rre"]["active"] == runs["dense"]["active"]
    assert runs["domain_top_k"]["active"] == runs["dense"]["active"] + 4 * gate
    assert runs["top_k"]["active"] == runs["dense"]["active"] + 8 * gate
    assert runs["top_k"]["total"] == runs["domain_top_k"]["total"] == runs["rre"]["total"] + 8 * gate
    experts = 3 * 16 * 8
    assert runs["domain_top_k"]["total"] - runs["domain_top_k"]["submodel"] == 4 * (experts + gate)
    assert runs["rre"]["total"] - runs["rre"]["submodel"] == 4 * experts
    assert (runs["top_k"]["submodel"], runs["dense"]["submodel"]) == (None, runs["dense"]["total"])
    assert (runs["dense"]["load"], runs["rre"]["load"] >= 1) == (None, True)


def test_losses_are_those_of_the_runs(suite):
    record = json.loads((suite / "out.json").read_text())
    for run in (suite / "runs").iterdir():
        ended = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        kept = record["runs"][run.name.split("-")[0]]["0"]
        for domain in ("recipes", "ships"):
            assert kept["loss"][domain] == pytest.approx(ended[f"heldout_loss/{domain}"], rel=1e-12)
            assert kept["bits_per_byte"][domain] == pytest.approx(ended[f"heldout_bits_per_byte/{domain}"], rel=1e-12)
    table = (suite / "out.md").read_text()
    assert f"| loss, nats a token | ships | {record['runs']['dense']['0']['loss']['ships']:.3f} |" in table
    assert "learning rate 0.002 for all, tuned for none" in table


def test_a_finished_suite_trains_nothing_again(suite, dataset, tmp_path):
    files = {path: path.stat().st_mtime_ns for path in (suite / "runs").rglob("*")}
    assert main([*words(dataset, suite / "runs"), f"out={tmp_path}/again"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (suite / "runs").rglob("*")} == files
    assert (tmp_path / "again.json").read_text() == (suite / "out.json").read_text()


def test_a_run_that_was_interrupted_goes_on(dataset, tmp_path):
    # More steps than any machine takes before it is interrupted.
    wanted, data = settings(runs=str(tmp_path), steps=10**6), open_dataset(dataset)
    heard, stopped = [], [0]

    def interrupt(stage, done, total):
        heard.append((stage, total))
        if done > stopped[-1]:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            finished_run(wanted, data, "dense", 1e-3, 0, interrupt)
        (run,) = tmp_path.iterdir()
        (step,) = (int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
        assert step > stopped[-1]
        stopped.append(step)
    assert set(heard) == {("dense, rate 0.001, seed 0", 10**6)}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(0, stopped[-1] + 1, 10)]
    assert [line["step"] for line in lines if "heldout_loss/ships" in line] == [0]


def test_other_data_is_not_mixed_in(suite, dataset, tmp_path):
    other = tmp_path / "other"
    made = ["data", "data=files", f"out={other}", "data.vocab_size=300", "data.heldout_fraction=0.2"]
    texts = {name: tmp_path / name for name in ("recipes", "ships")}
    for name, folder in texts.items():
        folder.mkdir()
        for number in range(40):
            (folder / f"{number}.txt").write_text(f"{number} {name} of another kind, and more of them: {number * 7}.")
    sets = ", ".join(f"{name}: '{folder}/*.txt'" for name, folder in texts.items())
    assert main([*made, f"data.domains={{{sets}}}"]) == 0
    wanted = settings(runs=str(suite / "runs"))
    with pytest.raises(ValueError, match=r"was trained on other data than .*: give another routers\.runs"):
        finished_run(wanted, open_dataset(other), "dense", 2e-3, 0, no_progress)


def test_mistakes_are_one_line(dataset, tmp_path, capfd):
    runs = tmp_path / "runs"
    for changes, message in (
        ({"dataset": "null"}, "routers.dataset is missing: give the directory"),
        ({"dataset": tmp_path / "none"}, "none"),
        ({"seeds": "[]"}, "routers: seeds must be at least one and differ"),
        ({"seeds": "[1,1]"}, "seeds must be at least one and differ"),
        ({"rates": "[]"}, "rates must be at least one and differ"),
        ({"tuning_seed": 0}, "tuning_seed 0 is one of seeds"),
        ({"experts": 3}, "experts 3 must be a multiple of top_k 2"),
        ({"top_k": 0}, "must be a multiple of top_k 0"),
        ({"steps": "many"}, "routers.steps must be a whole number"),
        ({"dim": 15}, "dim 15 is not divisible by num_heads 2"),  # the training process itself says so
    ):
        assert main(words(dataset, runs, **changes)) == 2
        told = capfd.readouterr().err
        assert message in told
        assert told.count("\n") == 1, told
        assert not runs.exists()


def test_differences_are_taken_seed_by_seed():
    runs = {name: [result(5.0, 7.0), result(4.0, 6.0)] for name in CONTENDERS}
    runs["rre"] = [result(5.5, 7.5), result(4.6, 6.4)]
    assert paired(runs, "rre", "top_k", "a") == pytest.approx([0.5, 0.6])
    assert paired(runs, "rre", "top_k", MEAN) == pytest.approx([0.5, 0.5])
    rows = {row[:2]: row[2:] for row in table_rows(runs)}
    assert rows["loss, nats a token", "a"] == ("4.500 ± 0.707",) * 3 + ("5.050 ± 0.636",)
    assert rows["loss minus top_k's", "a"] == ("+0.000 ± 0.000", "", "+0.000 ± 0.000", "+0.550 ± 0.071")
    assert rows["loss minus domain_top_k's", MEAN] == ("+0.000 ± 0.000", "+0.000 ± 0.000", "", "+0.500 ± 0.000")
    assert rows["bits a byte", MEAN][0] == "2.750 ± 0.354"
    assert rows["busiest expert over the mean", ""] == ("1.50 ± 0.00",) * 4


def test_one_seed_has_no_deviation():
    assert spread([4.25]) == "4.250"
    assert spread([1.0, -1.0], 1, signed=True) == "+0.0 ± 1.4"


def test_each_contender_takes_its_own_best_rate():
    losses = {"dense": (3, 2, 4), "top_k": (1, 2, 3), "domain_top_k": (3, 2, 1), "rre": (math.nan, 5, math.nan)}
    seen = []

    def run(name, rate, seed):
        seen.append(seed)
        return result(*[losses[name][(0.1, 0.2, 0.3).index(rate)]] * 2)

    rates, tuning = choose_rates(settings(rates=(0.1, 0.2, 0.3), tuning_seed=9), run)
    assert rates == {"dense": 0.2, "top_k": 0.1, "domain_top_k": 0.3, "rre": 0.2}
    assert tuning["dense"] == {0.1: 3, 0.2: 2, 0.3: 4}
    assert seen == [9] * 12
    assert choose_rates(settings(rates=(0.1,)), run) == (dict.fromkeys(CONTENDERS, 0.1), {})
    assert len(seen) == 12
    assert best_rate({0.1: math.nan, 0.2: 9.0}) == 0.2
