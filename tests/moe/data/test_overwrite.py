"""`overwrite=true` replaces a dataset or an empty folder, and never what else the user has."""

from pathlib import Path

import pytest

from sigmoe.launch.main import main
from sigmoe.moe.data.dataset import open_dataset


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Run `sigmoe data ... out=out` on texts of the user's in the working directory; returns the exit code."""
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / f"texts/{number}.txt").write_text(f"stir {number} " * (number + 2))
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> int:
        return main(["data", "data=files", "data.domains={recipes: texts/*.txt}", "out=out", *overrides])

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("diary.txt", "dear diary"),
        (".hidden", ""),
        ("deep/down/diary.txt", "dear diary"),
        ("dataset.json", "dear diary"),
        ("dataset.json", '{"name": "my own", "format_version": 1}'),
        ("dataset.json", "[]"),
        ("dataset.json/diary.txt", "dear diary"),
    ],
)
def test_a_folder_that_is_no_dataset_is_left_alone(prepare, tmp_path, capfd, name, text):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text(text)
    before = contents(tmp_path)
    assert prepare("overwrite=true") == 2
    told = capfd.readouterr().err
    assert told.strip() == "sigmoe data: out exists and is no dataset: choose another directory with out=..."
    assert contents(tmp_path) == before


def test_a_file_is_left_alone(prepare, tmp_path, capfd):
    (tmp_path / "out").write_text("dear diary")
    assert prepare("overwrite=true") == 2
    assert "out exists and is no dataset" in capfd.readouterr().err
    assert (tmp_path / "out").read_text() == "dear diary"


def test_a_dataset_is_replaced_only_when_asked(prepare, tmp_path, capfd):
    assert prepare("data.vocab_size=270") == 0
    before = contents(tmp_path)
    assert prepare("data.vocab_size=280") == 2
    assert "replace it with overwrite=true" in capfd.readouterr().err
    assert contents(tmp_path) == before
    assert prepare("data.vocab_size=280", "overwrite=true") == 0
    assert open_dataset(tmp_path / "out").vocab_size == 280
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_a_damaged_dataset_is_still_one(prepare, tmp_path):
    assert prepare("data.vocab_size=270") == 0
    expected = contents(tmp_path / "out")
    (tmp_path / "out/tokenizer.json").unlink()
    assert prepare("data.vocab_size=270", "overwrite=true") == 0
    assert contents(tmp_path / "out") == expected


def test_an_empty_folder_is_replaced(prepare, tmp_path):
    (tmp_path / "out").mkdir()
    assert prepare("overwrite=true") == 0
    assert open_dataset(tmp_path / "out").domain_names == ("recipes",)
