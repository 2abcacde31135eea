"""What a benchmark hands back: a table to read, and the numbers behind it to keep."""

import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BenchTable:
    """A finished measurement. `machine`: hardware, software, commit; `record`: JSON data, raw times included."""

    title: str
    columns: tuple[str, ...]  # the first holds text, the others figures
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]  # what the figures mean
    machine: Mapping[str, str]
    record: Mapping[str, object]

    def to_markdown(self) -> str:
        """Return the table, its notes and the machine as a Markdown document."""
        rule = ("---", *("---:" for _ in self.columns[1:]))
        lines = [f"# {self.title}", "", *(f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)), ""]
        lines += [*(f"- {note}" for note in self.notes), "", "| measured on | |", "|---|---|"]
        return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in self.machine.items())]) + "\n"

    def to_json(self) -> str:
        """Return machine and record as JSON."""
        data = {"title": self.title, "machine": dict(self.machine), **self.record}
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
