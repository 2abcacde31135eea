"""kill -9 anywhere in `sigmoe train`: the run that goes on ends with the same bits and the same metrics."""


def test_a_killed_run_ends_as_the_undisturbed_one(run_program, memory_folder, tiny, survived):
    found = run_program("kill_train.py", memory_folder, *tiny)
    problems = found["problems"]
    survived("kill -9 in training, one process", found["points"], found["points"] - len(problems))
    assert problems == {}
    assert found["points"] >= 20
    assert len(found["saves"]) == 3
    # Six steps, and the held-out losses at steps 0, 4 and 6.
    assert found["rows"] == 6 + 3
