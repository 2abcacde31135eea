"""A run directory whose own files were damaged: one line, or what was lost is written again; never a traceback."""

import json

import pytest


def test_a_damaged_config_is_one_line(train, tmp_path, capfd):
    assert train("out=run", "stop_at=1") == 0
    for text in ("a: [", "- a", '!!int ""', "\x00", "[" * 5000, ""):
        (tmp_path / "run/config.yaml").write_text(text)
        capfd.readouterr()
        assert train("out=run") == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "run/config.yaml" in line


@pytest.mark.parametrize("torn", [b'{"step": 5, "lo', b'\n["step"]\n{"step": 99}\n' + bytes(512)])
def test_torn_and_later_metrics_are_written_again(train, tmp_path, torn):
    """What a kill, or a disk that lost its last blocks, leaves at the end of metrics.jsonl."""
    assert train("out=run", "stop_at=4", "evaluate.every=2") == 0
    path = tmp_path / "run/metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    assert train("out=run", "evaluate.every=2") == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 10]
