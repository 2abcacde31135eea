"""kill -9 anywhere in a calibration: run again it goes on, and ends with the bytes of an undisturbed one."""

import os

EVERYTHING = os.environ.get("SIGMOE_FAULTS") == "all"  # `make faults` tries every disk operation


def test_a_killed_calibration_goes_on(run_program, memory_folder, survived):
    every, moments = (1, 30) if EVERYTHING else (9, 3)
    found = run_program("kill_calibration.py", memory_folder / "calibration", every, moments)
    points, problems, passed = found["points"], found["problems"], found["passed"]
    survived("kill -9 in a calibration", points, points - len(problems))
    assert problems == {}
    assert points >= 10
    assert {"mkdir", "write", "fsync", "replace", "rename", "unlink"} <= set(found["operations"])
    assert found["files"] == ["manifest.json", "sums.json", "sums.safetensors"]
    # The later the kill, the less is run again: what is finished stays.
    assert passed[0] == found["whole"] and passed == sorted(passed, reverse=True) and passed[-1] == 0
