"""How a report's models stand in a table: what extraction, conversion and pruning say alike."""

from collections.abc import Mapping
from typing import Any

MODEL_COLUMNS = ("model", "format", "MB", "parameters", "active a token")
_LISTED = 6  # layers
PRUNED_COLUMNS = ("model", "format", "experts", "MB", "parameters", "active a token")


def model_row(title: str, part: Mapping[str, Any]) -> list[str]:
    """Return the cells of `MODEL_COLUMNS` for a model's part of a report."""
    count = part["parameters"]
    size = f"{part['bytes']['tensors'] / 1e6:,.1f}"
    return [title, part["format"], size, f"{count['total']:,}", f"{count['active']:,}"]


def pruned_row(title: str, part: Mapping[str, Any]) -> list[str]:
    """Return the cells of `PRUNED_COLUMNS`: with the experts of a layer, of each, or the fewest and the most."""
    counts = part["experts"]
    name, format, *sizes = model_row(title, part)
    fewest, most = min(counts), max(counts)
    several = ", ".join(map(str, counts)) if len(counts) <= _LISTED else f"{fewest} to {most}"
    return [name, format, str(most) if fewest == most else several, *sizes]
