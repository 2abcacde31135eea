"""Fills the disk of one of two ranks while they save beside training. Prints one JSON object.

python full_background.py FOLDER OVERRIDE...
"""

import json
import resource
import sys
from pathlib import Path

import two_ranks
from two_ranks import RANKS, end, start

from sigmoe.launch.saves import Saves

FULL, FREE = 4, 8  # steps whose saves are the first that meets a full disk, and the first that does not
LIMIT = 20_000  # bytes: every file of tensors is longer, what else a rank writes is not
SETTINGS = ["save.every=2", "save.keep=null", "parallel.ep=2"]


def fill_disk():
    """Let every write beyond LIMIT fail, as on a full disk, between the saves of two steps."""
    begin = Saves.begin
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(saves, step, content):
        if step in (FULL, FREE):
            saves.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT if step == FULL else soft, hard))
        begin(saves, step, content)

    Saves.begin = limited


def run(folder, overrides, unlucky):
    """Train; what came of it."""
    status = end(start(folder, overrides, lambda rank: fill_disk() if rank == unlucky else None))
    checkpoints = folder / "run/checkpoints"
    newest = max(checkpoints.glob("step-*"))
    return {
        "status": status,
        "names": sorted(path.name for path in checkpoints.iterdir()),
        "manifest": json.loads((newest / "manifest.json").read_text()),
        "words": (folder / "words-0").read_text().splitlines(),
    }


def main(folder, overrides):
    two_ranks.load()
    overrides = [*overrides, *SETTINGS]
    whole = run(folder / "whole", overrides, None)
    return {
        "whole": whole["manifest"],
        "unlucky": {rank: run(folder / str(rank), overrides, rank) for rank in range(RANKS)},
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
