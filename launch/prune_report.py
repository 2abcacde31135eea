"""The page of a pruning: report.html, made from report.json alone; it needs no network, its script lies inside."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from plotly.offline import get_plotlyjs

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } caption { text-align: left; font-weight: 600 }
th, td { text-align: left; padding: 2px 12px 2px 0; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
td.number { text-align: right; font-variant-numeric: tabular-nums }
"""
_SCALE = [[0, "#f4f1ea"], [1, "#1f5f8b"]]
_DROPPED, _INSIDE, _OUTSIDE = "#c0392b", "#1f5f8b", "#c77f1a"
_ROW = 26  # pixels of a layer

Figure = dict[str, Any]  # of plotly: data and layout


def report_page(report: Mapping[str, Any]) -> bytes:
    """Return the page. Equal reports give equal bytes under one version of plotly; all that they say is escaped.

    `forecast`, where there is one, lists budgets: `kept`, the share of experts, and the loss that is expected to be
    `added`, in nats a token, between `low` and `high`.
    """
    name = _text(report["parent"]["name"])
    figures = [_saliency_figure(report["layers"])]
    if "load_before" in report["layers"][0]:
        figures.append(_load_figure(report["layers"]))
    if report["losses"] or report["forecast"]:
        figures.append(_cost_figure(report))
    places = "".join(f'<div id="figure-{number}"></div>\n' for number in range(len(figures)))
    calls = "".join(
        f'Plotly.newPlot("figure-{number}", {_script(figure["data"])}, {_script(figure["layout"])}, '
        "{displaylogo: false, responsive: true});\n"
        for number, figure in enumerate(figures)
    )
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}, pruned</title>\n'
        f"<style>{_STYLE}</style>\n<script>{get_plotlyjs()}</script></head>\n"
        f"<body><h1>{name}, pruned</h1>\n{_models(report)}{_losses(report)}{places}{_settings(report)}"
        f"{_tensors(report)}<script>\n{calls}</script></body></html>\n"
    )
    return page.encode()


def _saliency_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Each layer's saliencies over its largest, darker is higher; a cross marks what was dropped."""
    labels, width = [_label(layer) for layer in layers], max(len(layer["saliency"]) for layer in layers)
    dropped = [
        (expert, label)
        for layer, label in zip(layers, labels)
        for expert in range(len(layer["saliency"]))
        if expert not in set(layer["kept"])
    ]
    crosses = {
        "type": "scatter",
        "mode": "markers",
        "name": "dropped",
        "x": [expert for expert, _ in dropped],
        "y": [label for _, label in dropped],
        "marker": {"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": _DROPPED}},
        "hoverinfo": "skip",
        "showlegend": True,
    }
    rows = [_relative(layer["saliency"]) for layer in layers]
    values = [[f"{value:.6g}" if value is not None else "not finite" for value in x["saliency"]] for x in layers]
    heat = _heat(labels, rows, "saliency / largest of the layer", values, width)
    return {"data": [heat, crosses], "layout": _layout("Saliency of every expert", labels)}


def _load_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Each expert's share of the calibration tokens, times the number of experts: 1 is an even share."""
    labels, width = [_label(layer) for layer in layers], max(len(layer["saliency"]) for layer in layers)
    before = [[share * len(layer["load_before"]) for share in layer["load_before"]] for layer in layers]
    after: list[list[float | None]] = []
    for layer in layers:
        at = dict(zip(layer["kept"], layer["load_after"]))
        after.append([at[e] * len(at) if e in at else None for e in range(len(layer["load_before"]))])
    data = []
    for axis, rows in (("x", before), ("x2", after)):
        heat = _heat(
            labels, rows, "load, 1 is an even share", [[f"{x:.3g}" if x else "" for x in r] for r in rows], width
        )
        del heat["colorscale"], heat["colorbar"]
        data.append(heat | {"xaxis": axis, "coloraxis": "coloraxis"})
    layout = _layout("Load of the experts on the calibration text: before, and after", labels)
    layout["coloraxis"] = {"colorscale": _SCALE, "colorbar": {"title": {"text": "share x experts"}}}
    layout["xaxis"] |= {"domain": [0, 0.48], "title": {"text": "expert, before"}}
    layout["xaxis2"] = {"domain": [0.52, 1], "title": {"text": "expert, after"}}
    return {"data": data, "layout": layout}


def _cost_figure(report: Mapping[str, Any]) -> Figure:
    """Loss added, in nats a token, by the share of experts that stay: the forecast, and what was measured."""
    curve = report["forecast"] or ()
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "forecast, in domain",
            "x": [100 * budget["kept"] for budget in curve],
            "y": [budget["added"] for budget in curve],
            "error_y": {
                "type": "data",
                "array": [budget["high"] - budget["added"] for budget in curve],
                "arrayminus": [budget["added"] - budget["low"] for budget in curve],
            },
            "line": {"color": _INSIDE, "dash": "dot"},
        }
    ] * bool(curve)
    kept = 100 * sum(report["experts"]) / sum(report["parent"]["experts"])
    for inside, name, colour in ((True, "in domain", _INSIDE), (False, "out of domain", _OUTSIDE)):
        rows = [row for row in report["losses"] or () if row["in_domain"] == inside]
        for row in (row for row in rows if None not in (row["parent_loss"], row["pruned_loss"])):
            point = {"x": [kept], "y": [row["pruned_loss"] - row["parent_loss"]], "type": "scatter", "mode": "markers"}
            data.append(point | {"name": f"{_text(row['domain'])}, {name}", "marker": {"size": 11, "color": colour}})
    layout = {
        "title": {"text": "Loss added on held-out text"},
        "xaxis": {"title": {"text": "experts kept, %"}, "range": [0, 102]},
        "yaxis": {"title": {"text": "nats a token"}, "rangemode": "tozero"},
        "height": 420,
    }
    return {"data": data, "layout": layout}


def _heat(
    labels: Sequence[str], rows: Sequence[Sequence[Any]], title: str, values: Sequence[Sequence[str]], width: int
) -> dict[str, Any]:
    """A heat map, layers downwards; rows that are shorter than `width` end in gaps."""
    return {
        "type": "heatmap",
        "x": list(range(width)),
        "y": list(labels),
        "z": [[*row, *[None] * (width - len(row))] for row in rows],
        "customdata": [[*row, *[""] * (width - len(row))] for row in values],
        "hovertemplate": "%{y}, expert %{x}: %{customdata}<extra></extra>",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "colorscale": _SCALE,
        "colorbar": {"title": {"text": title, "side": "right"}},
    }


def _layout(title: str, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "title": {"text": title},
        "xaxis": {"title": {"text": "expert"}},
        "yaxis": {"type": "category", "autorange": "reversed"},
        "height": 200 + _ROW * len(labels),
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    }


def _relative(values: Sequence[float | None]) -> list[float | None]:
    largest = max((value for value in values if value is not None), default=0.0)
    return [None if value is None else value / largest if largest else 0.0 for value in values]


def _label(layer: Mapping[str, Any]) -> str:
    return f"layer {layer['layer']}"


def _models(report: Mapping[str, Any]) -> str:
    rows = []
    for name, part in ((report["parent"]["name"], report["parent"]), ("pruned", report)):
        experts, count = part["experts"], part["parameters"]
        number = str(experts[0]) if len(set(experts)) == 1 else f"{min(experts)} to {max(experts)}"
        size = f"{part['bytes']['tensors'] / 1e6:,.1f}"
        rows.append([name, part["format"], number, size, f"{count['total']:,}", f"{count['active']:,}"])
    return _table(f"Written as {report['format']}: {report['reason']}", _MODELS, rows, numbers=4)


def _losses(report: Mapping[str, Any]) -> str:
    before = (report.get("healed") or {}).get("losses_before") or ()
    rows = [
        [
            row["domain"],
            ("in domain" if row["in_domain"] else "out of domain") + note,
            f"{row['tokens']:,}",
            *(_number(row[key]) for key in ("parent_perplexity", "pruned_perplexity", "perplexity_ratio", "kl")),
            "" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %",
        ]
        for part, note in ((before, ", before healing"), (report.get("losses") or (), ""))
        for row in part
    ]
    return _table("Measured on held-out text", _LOSSES, rows, numbers=6) if rows else ""


def _settings(report: Mapping[str, Any]) -> str:
    flat = dict(_flat({key: report[key] for key in report if key not in _SHOWN}))
    flat |= {f"parent.{key}": report["parent"][key] for key in ("identity", "format")}
    return _table("Settings and identity", ("key", "value"), [[key, _plain(value)] for key, value in flat.items()])


def _tensors(report: Mapping[str, Any]) -> str:
    rows = []
    for name, tensor in report["tensors"].items():
        whole = tensor["rows"] is None and tensor["mean_of"] is None and not tensor.get("healed")
        same = "the parent's" if whole else "rows of the parent's" if tensor["rows"] is not None else "computed"
        rows.append([name, tensor["source"], same, tensor["sha256"] or "not taken"])
    table = _table("Every tensor", ("tensor", "made of", "bytes", "SHA-256"), rows)
    return f"<details><summary>{len(rows):,} tensors and their hashes</summary>\n{table}</details>\n"


_MODELS = ("model", "format", "experts", "MB", "parameters", "active a token")
_LOSSES = ("domain", "", "tokens", "perplexity, parent", "perplexity, pruned", "ratio", "KL, nats", "same first choice")
_SHOWN = (
    "layers",
    "tensors",
    "parent",
    "losses",
    "healed",
    "forecast",
    "parameters",
    "bytes",
    "experts",
    "reason",
    "format",
)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0) -> str:
    """A table, the last `numbers` columns set to the right."""
    left = len(columns) - numbers
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=number' if x >= left else ''}>{_text(cell)}</td>" for x, cell in enumerate(row))
        + "</tr>\n"
        for row in rows
    )
    return f"<table><caption>{_text(title)}</caption>\n<tr>{head}</tr>\n{body}</table>\n"


def _flat(data: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in data.items():
        found += _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else [(f"{path}{key}", value)]
    return found


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.4g}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: str) -> str:
    return html.escape(value)


def _script(data: Any) -> str:
    """JSON that no text in it can end the script with."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")
