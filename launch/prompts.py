"""The prompts that a command is given: as a text, a list, a file, or on stdin."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..moe.data.installed import read_utf8


def read_prompts(prompt: str | None, prompts: Sequence[str] | None, file: str | None) -> list[str]:
    """Return the prompts of the one source that is given; ValueError names what is empty, unreadable or no Unicode."""
    match (prompt, prompts, file):
        case (str(), None, None):
            # The line's end comes from the shell, not from the prompt.
            texts = [_read_stdin().removesuffix("\n") if prompt == "-" else prompt]
        case (None, Sequence(), None):
            texts = list(prompts)
        case (None, None, str()):
            texts = _read_file(Path(file).expanduser())
        case _:
            raise ValueError("give one of prompt=TEXT (prompt=- reads stdin), prompts=[...] and prompts_file=FILE")
    if not texts:
        raise ValueError("there are no prompts: give at least one")
    for number, text in enumerate(texts, 1):
        if not text:
            raise ValueError(f"prompt {number} of {len(texts)} is empty: give it text")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, or what stands for a byte that is not UTF-8
            at = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
            raise ValueError(f"prompt {number} of {len(texts)} is not valid Unicode ({at}): give UTF-8") from error
    return texts


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not valid Unicode ({error.reason}): give UTF-8") from error


def _read_file(path: Path) -> list[str]:
    """Return a prompt a line: of .jsonl its field text, else the line itself; lines of white space are left out."""
    # Not splitlines: JSON may hold its line separators as they are.
    lines = [line.removesuffix("\r") for line in read_utf8(path).split("\n")]
    if path.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    return [_text(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f"{path}, line {number} is no object with a field text")
    text: str = row["text"]
    return text
