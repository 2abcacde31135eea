"""Where a command is to write: looked at before it does the work."""

import os
from pathlib import Path


def check_out(out: str | Path, *files: Path) -> None:
    """Raise ValueError where one of `files`, which `out` asks for, could not be written by `write_file`."""
    for file in files:
        if file.is_symlink() or file.is_dir():
            raise ValueError(f"out={out}: {file} is a link or a directory: give another out=")
        place = file.absolute().parent
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise ValueError(f"out={out}: {place} is no directory that can be written to: give another out=")
