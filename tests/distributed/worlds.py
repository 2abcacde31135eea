"""Starts the ranks of a test world as processes, and waits for them."""

import os
import subprocess
import sys
from pathlib import Path

# Ranks compute on the CPU, Triton's kernels among it interpreted.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}


def run_ranks(program, world, folder, *words, seconds=280):
    """Run `program RANK WORLD FOLDER WORDS...` of this folder once a rank; returns what went wrong, None where nothing.

    No rank outlives the call.
    """
    ranks = []
    for rank in range(world):
        command = [sys.executable, str(Path(__file__).with_name(program)), str(rank), str(world), str(folder), *words]
        with (folder / f"words{rank}").open("w") as told:
            ranks.append(subprocess.Popen(command, stdout=told, stderr=told, env=os.environ | ENVIRONMENT))
    try:
        codes = [rank.wait(timeout=seconds) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = [rank.poll() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if codes == [0] * world:
        return None
    return "\n".join(
        f"rank {n} ended with {codes[n]}\n{(folder / f'words{n}').read_text()[-3000:]}" for n in range(world)
    )
