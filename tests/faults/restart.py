"""`sigmoe train` as torchrun starts it; the first time rank 1 kills itself as step 5 begins.

python restart.py OVERRIDE...
"""

import os
import sys
from pathlib import Path

from inject import at_step, record_samples, signalled

from sigmoe.launch.main import main

if __name__ == "__main__":
    attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    record_samples(f"samples-{attempt}-{rank}")
    if (attempt, rank) == ("0", "1"):
        at_step(5, signalled("SIGKILL"))
    Path(f"began-{attempt}-{rank}").touch()
    sys.exit(main(["train", *sys.argv[1:]]))
