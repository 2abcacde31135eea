"""What an evaluation prints, and the JSON and the picture that it keeps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..moe.counts import count_parameters
from ..moe.data.dataset import Dataset
from ..moe.storage.checkpoint import encode_json
from ..moe.storage.durable import make_directory, write_file
from ..moe.stored import StoredModel
from .console import notes, print_table
from .evaluation import DomainLoss, HeldoutSettings
from .evaluation_matrix import Cell, Cells, Row


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Rows, their cells by text, and all that led to them."""

    dataset: Dataset
    texts: tuple[str, ...]
    models: tuple[tuple[str, StoredModel], ...]  # as given, and opened
    settings: HeldoutSettings
    device: str
    rows: Sequence[Row]
    cells: Sequence[Cells]  # of each row

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data; figures that are not finite are null."""
        return {
            "format_version": 1,
            "dataset": {"path": str(self.dataset.path), "digest": self.dataset.digest},
            "settings": {
                "texts": list(self.texts),
                "tokens": self.settings.max_tokens,
                "batch": self.settings.batch_size,
                "sequence_length": self.settings.sequence_length,
                "device": self.device,
                "threads": torch.get_num_threads(),
            },
            "models": [_model_json(given, stored) for given, stored in self.models],
            "rows": [
                {
                    "label": row.label,
                    "model": row.model,
                    "domain": row.route,
                    "auto_tokens": row.auto_tokens,
                    "cells": {text: _cell_json(cell) for text, cell in cells.items()},
                }
                for row, cells in zip(self.rows, self.cells)
            ],
        }


def show(evaluation: Evaluation) -> None:
    """Print one row as a table of its texts, several as a matrix of bits per byte; and which domains were chosen."""
    for given, stored in evaluation.models:
        count = count_parameters(stored.config, stored.registry)
        notes().print(f"{given}: {stored.format}, {count.total:,} parameters, {count.active:,} active a token")
    length, tokens = evaluation.settings.sequence_length, evaluation.settings.max_tokens
    read = "all held-out text" if tokens is None else f"held-out text, at the most {tokens:,} tokens a domain"
    title = f"{evaluation.dataset.path}: {read}, in sequences of {length}"
    if len(evaluation.rows) == 1:
        _print_row(f"{title}; {evaluation.rows[0].label}", evaluation.cells[0])
    else:
        _print_matrix(f"{title}; bits per byte, * the best of its column", evaluation)
        _print_right(evaluation)


def keep(evaluation: Evaluation, stem: Path) -> tuple[Path, Path]:
    """Write `stem`.json and `stem`.svg; return their paths."""
    from .matrix_picture import draw_matrix  # matplotlib takes a while

    picture = draw_matrix(
        [row.label for row in evaluation.rows],
        list(evaluation.texts),
        [[cells[text].loss.bits_per_byte for text in evaluation.texts] for cells in evaluation.cells],
    )
    paths = kept_paths(stem)
    make_directory(stem.absolute().parent)
    for path, data in zip(paths, (encode_json(evaluation.to_json()), picture)):
        write_file(path, data)
    return paths


def kept_paths(stem: Path) -> tuple[Path, Path]:
    """Return the files that `keep` writes."""
    return stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.svg")


def _model_json(given: str, stored: StoredModel) -> dict[str, Any]:
    count = count_parameters(stored.config, stored.registry)
    return {
        "checkpoint": given,
        "path": str(stored.path),
        "format": stored.format,
        "domains": list(stored.registry.names),
        "parameters": {"total": count.total, "active": count.active},
    }


def _cell_json(cell: Cell) -> dict[str, Any]:
    loss = cell.loss
    figures = {"loss": loss.loss, "perplexity": loss.perplexity, "bits_per_byte": loss.bits_per_byte}
    data: dict[str, Any] = {
        **loss.to_json(),
        **{name: value if math.isfinite(value) else None for name, value in figures.items()},
    }
    if cell.taken is not None:
        data["documents"] = sum(cell.taken.values())
        data["taken"] = dict(cell.taken)
        data["right"] = cell.right
    return data


def _print_row(title: str, cells: Cells) -> None:
    columns = ["domain", "loss", "perplexity", "bits per byte", "tokens"]
    rows = [
        [text, f"{c.loss.loss:.4f}", f"{c.loss.perplexity:,.2f}", f"{c.loss.bits_per_byte:.4f}", f"{c.loss.tokens:,}"]
        for text, c in cells.items()
    ]
    if any(cell.taken is not None for cell in cells.values()):
        columns += ["documents", "own domain chosen"]
        for row, cell in zip(rows, cells.values()):
            row += [f"{sum((cell.taken or {}).values()):,}", _percent(cell.right)]
    print_table(title, columns, rows)


def _print_matrix(title: str, evaluation: Evaluation) -> None:
    best = {text: min(_order(cells[text].loss) for cells in evaluation.cells) for text in evaluation.texts}
    rows = []
    for row, cells in zip(evaluation.rows, evaluation.cells):
        figures = []
        for text, cell in cells.items():
            mark = "*" if _order(cell.loss) == best[text] < math.inf else " "
            figures.append(f"{cell.loss.bits_per_byte:.4f} {mark}")
        rows.append([row.label, *figures])
    print_table(title, ["experts of", *evaluation.texts], rows)


def _print_right(evaluation: Evaluation) -> None:
    """Print how often documents chose their own domain, a line for each number of tokens that they chose by."""
    chose = [(row, cells) for row, cells in zip(evaluation.rows, evaluation.cells) if row.chooses]
    if not chose:
        return
    documents = [f"{sum((cell.taken or {}).values()):,}" for cell in chose[0][1].values()]
    rows = [[row.label, *(_percent(cell.right) for cell in cells.values())] for row, cells in chose]
    print_table("documents that chose their own domain", ["", *evaluation.texts], [["documents", *documents], *rows])


def _order(loss: DomainLoss) -> float:
    """Bits per byte for a comparison: what is no number comes last."""
    return loss.bits_per_byte if math.isfinite(loss.bits_per_byte) else math.inf


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
