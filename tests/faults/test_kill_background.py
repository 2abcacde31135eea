"""kill -9 of ranks that save beside training: the run that goes on ends with the bytes of the undisturbed one."""

import os
from importlib.util import find_spec

import pytest

EVERYTHING = os.environ.get("SIGMOE_FAULTS") == "all"  # `make faults` kills at 60 points

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None or find_spec("megatron") is None, reason="needs deepspeed and megatron-core"
)


def test_a_killed_run_of_two_ranks_ends_as_the_undisturbed_one(run_program, memory_folder, tiny, survived):
    found = run_program("kill_background.py", memory_folder / "background", 60 if EVERYTHING else 4, *tiny)
    tried, problems = found["tried"], found["problems"]
    survived("kill -9 of a rank that saves beside training", tried, tried - len(problems))
    assert problems == {}
    assert tried >= (50 if EVERYTHING else 4)
    assert min(found["operations"]) >= 4  # both ranks write
    assert not EVERYTHING or found["in_a_save"] >= 5
