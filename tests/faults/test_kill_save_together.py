"""kill -9 of one of two ranks in the middle of their save: the other ends with an error, no half checkpoint stands."""

import os

import pytest

EVERYTHING = os.environ.get("SIGMOE_FAULTS") == "all"  # `make faults` tries every disk operation


@pytest.mark.parametrize("how", ["waiting", "beside"])
def test_a_rank_killed_in_a_save_of_two_costs_that_save_alone(run_program, memory_folder, survived, how):
    found = run_program("kill_save_together.py", memory_folder / how, how, 100 if EVERYTHING else 5)
    tried, problems = found["tried"], found["problems"]
    beside = " beside training" if how == "beside" else ""
    survived(f"kill -9 of one of two ranks in a save{beside}", tried, tried - len(problems))
    assert problems == {}
    assert tried >= (20 if EVERYTHING else 7)
    assert min(found["operations"]) >= 2  # both ranks write
