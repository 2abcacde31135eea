"""The page of a pruning: what it shows, that it needs nobody else, that nothing in it comes alive."""

import json
import re
from pathlib import Path

import plotly.graph_objects
import pytest

from sigmoe.launch.main import main
from sigmoe.launch.prune_report import report_page
from sigmoe.moe.config import RouterConfig

EVIL = '</script><img src="http://x/" onerror=alert(1)>'


@pytest.fixture(scope="module")
def out(write_model, dataset, tmp_path_factory):
    """A model of layers of unequal numbers, pruned with everything measured."""
    folder = tmp_path_factory.mktemp("page")
    model = write_model(RouterConfig(name="top_k", num_experts=6))
    keys = [f"data={dataset}", "domain=ships", "tokens=400", "global=7", "evaluate=300", "threads=1"]
    assert main(["prune", f"model={model}", f"out={folder}/out", *keys]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "report.json").read_text())


def figures(page):
    """The figures, as plotly for Python takes them, which refuses what plotly would ignore."""
    _, calls = page.rsplit("<script>", 1)
    decoder, found = json.JSONDecoder(), []
    for match in re.finditer(r'Plotly\.newPlot\("figure-\d+", ', calls):
        data, end = decoder.raw_decode(calls, match.end())
        layout, _ = decoder.raw_decode(calls, end + 2)
        found.append(plotly.graph_objects.Figure(data=data, layout=layout))
    return found


def test_it_is_made_of_the_report_alone(out, report):
    assert (out / "report.html").read_bytes() == report_page(report)
    files = json.loads((out / "manifest.json").read_text())["files"]
    assert "report.html" in files
    assert main(["verify", f"checkpoint={out}"]) == 0


def test_it_needs_no_network(report):
    page = report_page(report).decode()
    own = page.replace(Path(plotly.__file__).with_name("package_data").joinpath("plotly.min.js").read_text("utf-8"), "")
    assert len(own) < len(page) - 1_000_000 and "http" not in own
    assert not re.search(r"<(link|img|iframe)|<script[^>]+src|@import|url\(", own)


def test_the_figures_show_the_report(report):
    saliency, load, cost = figures(report_page(report).decode())
    heat, crosses = saliency.data
    marked = set(zip(crosses.x, crosses.y))
    for row, layer in enumerate(report["layers"]):
        label, largest = f"layer {layer['layer']}", max(layer["saliency"])
        assert heat.y[row] == label
        assert list(heat.z[row]) == pytest.approx([value / largest for value in layer["saliency"]])
        assert {e for e, y in marked if y == label} == set(range(6)) - set(layer["kept"])
        before, after = (list(trace.z[row]) for trace in load.data)
        assert before == pytest.approx([6 * share for share in layer["load_before"]])
        assert [e for e, value in enumerate(after) if value is not None] == layer["kept"]
        assert sum(value for value in after if value is not None) == pytest.approx(len(layer["kept"]))
    forecast, *measured = cost.data
    assert list(forecast.x) == [100 * budget["kept"] for budget in report["forecast"]]
    points = {trace.name: (trace.x[0], trace.y[0]) for trace in measured}
    assert set(points) == {"recipes, out of domain", "ships, in domain"}
    (ships,) = (row for row in report["losses"] if row["in_domain"])
    assert points["ships, in domain"] == pytest.approx((100 * 7 / 12, ships["pruned_loss"] - ships["parent_loss"]))


def test_what_comes_from_outside_is_text(report):
    evil = json.loads(json.dumps(report).replace("ships", json.dumps(EVIL)[1:-1]))
    evil["parent"]["name"] = evil["reason"] = EVIL
    evil["tensors"] = {EVIL: next(iter(report["tensors"].values()))}
    page = report_page(evil).decode()
    assert EVIL not in page and "<img" not in page.rsplit("</head>", 1)[1]
    assert page.count("</script>") == report_page(report).decode().count("</script>") == 2


def test_layers_that_end_early_end_in_gaps(report):
    layers = [{key: layer[key] for key in ("layer", "kept", "saliency")} for layer in report["layers"]]
    layers[1] |= {"kept": [0, 1], "saliency": [3.0, 2.0, None, 1.0]}
    (saliency,) = figures(report_page(report | {"layers": layers, "losses": None, "forecast": None}).decode())
    assert list(saliency.data[0].z[1][:4]) == pytest.approx([1, 2 / 3, None, 1 / 3])
    assert list(saliency.data[0].z[1][4:]) == [None, None] and list(saliency.data[0].x) == list(range(6))


def test_a_forecast_is_drawn_and_healing_is_told(report):
    budgets = ((0.5, 0.25, 0.125, 0.5), (1.0, 0.0, 0.0, 0.0))
    forecast = [dict(zip(("kept", "added", "low", "high"), budget)) for budget in budgets]
    healed = {"losses": [1.0], "losses_before": report["losses"]}
    page = report_page(report | {"forecast": forecast, "healed": healed}).decode()
    curve = figures(page)[2].data[0]
    assert (list(curve.x), list(curve.y)) == ([50, 100], [0.25, 0])
    assert (list(curve.error_y.array), list(curve.error_y.arrayminus)) == ([0.25, 0], [0.125, 0])
    names = {trace.name: trace for trace in figures(page)[2].data[1:]}
    assert set(names) == {
        f"{domain}{how}"
        for domain in ("ships, in domain", "recipes, out of domain")
        for how in (", healed", ", before healing")
    }
    assert len({names[f"ships, in domain{how}"].marker.symbol for how in (", healed", ", before healing")}) == 2
    merged = report | {"settings": report["settings"] | {"merge": True}}
    assert {trace.name for trace in figures(report_page(merged).decode())[2].data[1:]} == {
        "ships, in domain, merged",
        "recipes, out of domain, merged",
    }
    assert page.count("in domain, before healing</td>") == 1
    assert page.count("out of domain, before healing</td>") == 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["criterion=weight", "evaluate=9"], "evaluate needs held-out text: give data= a prepared dataset"),
        (["criterion=weight", "evaluate=-1"], "evaluate must be at least 0, got -1"),
        (["criterion=weight", "heal=2"], "heal trains on the calibration text: give data="),
        (["criterion=weight", "heal_lr=0"], "heal_lr must be a finite number above 0, got 0"),
    ],
)
def test_mistakes_are_one_line(write_model, tmp_path, capfd, keys, words):
    model = write_model(RouterConfig(name="top_k", num_experts=3))
    assert main(["prune", f"model={model}", f"out={tmp_path}/out", "keep=0.7", *keys]) == 2
    assert words in capfd.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())
