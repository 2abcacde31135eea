"""kill -9 anywhere in `sigmoe prune`: a whole model or none; run again it goes on, and ends with the same bytes."""

import os

EVERYTHING = os.environ.get("SIGMOE_FAULTS") == "all"  # `make faults` kills thirty times


def test_a_killed_prune_goes_on(run_program, memory_folder, survived):
    found = run_program("kill_prune.py", memory_folder / "prune", 30 if EVERYTHING else 6)
    points, problems, kept = found["points"], found["problems"], found["kept"]
    survived("kill -9 in a prune", len(points), len(points) - len(problems))
    assert problems == {}
    assert {"mkdir", "write", "fsync", "rename"} <= set(found["operations"])
    weights = [name for name in found["files"] if name.endswith(".safetensors")]
    assert len(weights) >= 3 and "report.json" in found["files"]
    # The later the kill, the less is written again: what is finished stays.
    assert kept == sorted(kept) and kept[-1] == len(weights)
