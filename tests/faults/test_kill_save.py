"""kill -9 at every disk operation of a save: what stands is the old state or the new one, and saving again succeeds."""


def test_a_killed_save_leaves_the_old_state_or_the_new(run_program, memory_folder, survived):
    found = run_program("kill_save.py", memory_folder)
    for outcome in found.values():
        points, problems = len(outcome["operations"]), outcome["problems"]
        survived("kill -9 in a save of one process", points, points - len(problems))
        assert problems == {}
        assert points >= 20
    # The points lie in every phase: files, folders, both renames of a replacement, `latest`, and two deletions.
    operations = found["replace"]["operations"]
    assert set(operations) == {"mkdir", "write", "fsync", "rename", "replace", "unlink", "rmdir"}
    assert operations.count("rename") == 4
