"""kill -9 at every disk operation of a save: what stands is the old state or the new one, and saving again succeeds."""

import pytest


@pytest.fixture(scope="module")
def found(run_program, memory_folder):
    return run_program("kill_save.py", memory_folder)


@pytest.mark.parametrize("scenario", ["prune", "replace"])
def test_a_killed_save_leaves_the_old_state_or_the_new(found, scenario):
    points, problems = found[scenario]["operations"], found[scenario]["problems"]
    print(f"kill -9 in a save ({scenario}): points tried {len(points)}, survived {len(points) - len(problems)}")
    assert problems == {}
    assert len(points) >= 20


def test_the_points_lie_in_every_phase(found):
    """Files, folders, both renames of a replacement, `latest`, and the deletion of what is too old."""
    operations = found["replace"]["operations"]
    assert set(operations) == {"mkdir", "write", "fsync", "rename", "replace", "unlink", "rmdir"}
    assert operations.count("rename") == 4
