"""The figures of a pruning's page, as plotly's data and layout: saliencies, loads, and what it cost."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

_SCALE = [[0, "#f4f1ea"], [1, "#1f5f8b"]]
_DROPPED, _INSIDE, _OUTSIDE = "#c0392b", "#1f5f8b", "#c77f1a"
_ROW = 26  # pixels of a layer

Figure = dict[str, Any]  # of plotly: data and layout


def saliency_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
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


def load_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
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


def cost_figure(report: Mapping[str, Any]) -> Figure:
    """Loss added, in nats a token, by the share of experts that stay: the forecast, and what was measured.

    What was merged or healed is named so; measured before the healing is a point of its own.
    """
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
    healed = report["healed"] or {}
    made = ", merged" if report["settings"]["merge"] else ""
    data += _measured(report, report["losses"] or (), made + (", healed" if healed else ""), "circle")
    data += _measured(report, healed.get("losses_before") or (), f"{made}, before healing", "circle-open")
    layout = {
        "title": {"text": "Loss added on held-out text"},
        "xaxis": {"title": {"text": "experts kept, %"}, "range": [0, 102]},
        "yaxis": {"title": {"text": "nats a token"}, "rangemode": "tozero"},
        "height": 420,
    }
    return {"data": data, "layout": layout}


def _measured(report: Mapping[str, Any], losses: Sequence[Mapping[str, Any]], made: str, symbol: str) -> list[Figure]:
    """Return a point a domain; `made` says what was done to the model besides pruning."""
    kept, points = 100 * sum(report["experts"]) / sum(report["parent"]["experts"]), []
    for row in sorted(losses, key=lambda row: not row["in_domain"]):
        if None in (row["parent_loss"], row["pruned_loss"]):
            continue
        where = "in domain" if row["in_domain"] else "out of domain"
        marker = {"size": 11, "symbol": symbol, "color": _INSIDE if row["in_domain"] else _OUTSIDE}
        points.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{html.escape(row['domain'])}, {where}{made}",
                "x": [kept],
                "y": [row["pruned_loss"] - row["parent_loss"]],
                "marker": marker,
            }
        )
    return points


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
