"""The page of a pruning: report.html, made from report.json alone; it needs no network, its script lies inside."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from plotly.offline import get_plotlyjs

from .model_table import PRUNED_COLUMNS, pruned_row
from .prune_figures import cost_figure, load_figure, saliency_figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } caption { text-align: left; font-weight: 600 }
th, td { text-align: left; padding: 2px 12px 2px 0; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
td.number { text-align: right; font-variant-numeric: tabular-nums }
"""
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


def report_page(report: Mapping[str, Any]) -> bytes:
    """Return the page. Equal reports give equal bytes under one version of plotly; all that they say is escaped.

    `forecast`, where there is one, lists budgets: `kept`, the share of experts, and the loss that is expected to be
    `added`, in nats a token, between `low` and `high`.
    """
    name = _text(report["parent"]["name"])
    figures = [saliency_figure(report["layers"])]
    if "load_before" in report["layers"][0]:
        figures.append(load_figure(report["layers"]))
    if report["losses"] or report["forecast"]:
        figures.append(cost_figure(report))
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


def _models(report: Mapping[str, Any]) -> str:
    rows = [pruned_row(report["parent"]["name"], report["parent"]), pruned_row("pruned", report)]
    return _table(f"Written as {report['format']}: {report['reason']}", PRUNED_COLUMNS, rows, numbers=4)


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
