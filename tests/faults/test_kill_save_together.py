"""kill -9 of one of two ranks in the middle of their save: the other ends with an error, no half checkpoint stands."""


def test_a_rank_killed_in_a_save_of_two_costs_that_save_alone(run_program, memory_folder):
    found = run_program("kill_save_together.py", memory_folder / "together")
    print(f"kill -9 of one of two saving ranks: points tried {found['tried']}, failed {len(found['problems'])}")
    assert found["problems"] == {}
    assert found["tried"] >= 10
    assert min(found["operations"]) >= 2  # both ranks write
