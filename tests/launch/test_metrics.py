"""metrics.jsonl: a disk that refuses ends nothing, loses no line and leaves no half of one."""

import json

import pytest

from sigmoe.launch.metrics import Metrics


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("room", [0, 7], ids=["none", "half a line"])
def test_a_full_disk_costs_no_line(tmp_path, limit_files, room):
    told = []
    metrics = Metrics(tmp_path, told.append, tensorboard=False, resumed_step=-1)
    metrics.write({"step": 1, "loss": 2.5})
    limit_files(metrics.path.stat().st_size + room)
    for step in (2, 3):
        metrics.write({"step": step, "loss": float("nan")})
        assert [row["step"] for row in rows(tmp_path)] == [1]
    limit_files(None)
    (line,) = told
    assert line.endswith("metrics.jsonl is not written, its lines are kept for later: File too large")
    metrics.write({"step": 4})
    metrics.close()
    assert rows(tmp_path) == [{"step": 1, "loss": 2.5}, *({"step": n, "loss": None} for n in (2, 3)), {"step": 4}]


def test_lines_that_were_kept_are_written_at_the_end(tmp_path, limit_files):
    metrics = Metrics(tmp_path, lambda line: None, tensorboard=False, resumed_step=-1)
    limit_files(0)
    metrics.write({"step": 1})
    limit_files(None)
    metrics.close()
    assert rows(tmp_path) == [{"step": 1}]


def test_a_writer_of_tensorboard_that_has_failed_is_left_alone(tmp_path):
    told = []
    metrics = Metrics(tmp_path, told.append, tensorboard=True, resumed_step=-1)
    metrics.write({"step": 1, "loss": 2.5})
    writer = metrics._writer.file_writer.event_writer._async_writer
    metrics._writer.flush()
    writer._worker.exception = OSError(28, "No space left on device")  # as its thread leaves it
    for step in (2, 3):
        metrics.write({"step": step, "loss": 2.5})
    metrics.close()
    assert told == ["tensorboard/ is not written any more in this session: No space left on device"]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
