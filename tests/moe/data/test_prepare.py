import json
from dataclasses import replace
from pathlib import Path

import pytest

from sigmoe.moe.data.config import DataConfig
from sigmoe.moe.data.dataset import Dataset, open_dataset
from sigmoe.moe.data.files import Files
from sigmoe.moe.data.prepare import _spool_folder, prepare
from sigmoe.moe.data.source import Workspace
from sigmoe.moe.data.tokenizer import open_tokenizer

Sources = dict[str, tuple[Files, ...]]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(cache=tmp_path / "cache")


def split_texts(dataset: Dataset, domain: str) -> dict[str, list[str]]:
    tokenizer = open_tokenizer(dataset.tokenizer_path)
    splits = {}
    for split in ("train", "heldout"):
        documents = getattr(dataset.domain(domain), split)
        ids = [documents.document(index)[:-1].tolist() for index in range(documents.num_documents)]
        splits[split] = tokenizer.decode_batch(ids, skip_special_tokens=False)
    return splits


def test_every_document_is_there_once(dataset: Dataset, texts: dict[str, list[str]]) -> None:
    dataset.verify()
    for name, documents in texts.items():
        splits = split_texts(dataset, name)
        assert splits["train"] and splits["heldout"]
        assert sorted(splits["train"] + splits["heldout"]) == sorted(set(documents))
        entry = dataset.manifest["domains"][dataset.domain(name).id]
        assert entry["duplicates"] == len(documents) - len(set(documents))
        for split, kept in splits.items():
            assert entry["splits"][split]["documents"] == len(kept)
            assert entry["splits"][split]["bytes"] == sum(len(text.encode()) for text in kept)


def test_provenance_is_recorded(dataset: Dataset, text_files: Path) -> None:
    (source,) = dataset.manifest["domains"][1]["sources"]
    assert source["name"] == str(text_files / "law.jsonl")
    assert len(source["sha256"]) == 64
    assert source["licence"] == "not stated"
    assert dataset.manifest["settings"]["domains"]["law"][0]["kind"] == "Files"
    assert dataset.manifest["settings"]["vocab_size"] == 400


def test_the_same_settings_do_nothing_and_others_are_refused(
    small_config: DataConfig, small_sources: Sources, tmp_path: Path, workspace: Workspace
) -> None:
    out = tmp_path / "deep" / "out"
    assert prepare(small_config, small_sources, out, workspace)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not prepare(small_config, small_sources, out, workspace)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    other = replace(small_config, vocab_size=300)
    with pytest.raises(ValueError, match="exists and was not made with these settings"):
        prepare(other, small_sources, out, workspace)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert prepare(other, small_sources, out, workspace, overwrite=True)
    assert open_dataset(out).vocab_size == 300
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_result_is_reproducible(
    small_config: DataConfig, small_sources: Sources, dataset: Dataset, tmp_path: Path, workspace: Workspace
) -> None:
    prepare(small_config, small_sources, tmp_path / "again", workspace)
    for path in dataset.path.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_changed_files_and_damaged_results_are_not_up_to_date(
    small_config: DataConfig, tmp_path: Path, workspace: Workspace
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40)))
    sources = {"a": (Files(files=str(file)),)}
    assert prepare(small_config, sources, tmp_path / "out", workspace)
    (tmp_path / "out" / "a.train.idx").unlink()
    with pytest.raises(ValueError, match="exists and was not made"):
        prepare(small_config, sources, tmp_path / "out", workspace)
    assert prepare(small_config, sources, tmp_path / "out", workspace, overwrite=True)
    file.write_text(file.read_text() + '{"text": "more"}\n')
    with pytest.raises(ValueError, match="exists and was not made"):
        prepare(small_config, sources, tmp_path / "out", workspace)


@pytest.mark.parametrize(
    ("content", "fraction", "message"),
    [
        ('{"text": "one"}\n', 0.5, "domain 'bad' has 1 different documents: it needs at least two"),
        ('{"text": "one"}\n{"text": "one"}\n', 0.5, "domain 'bad' has 1 different documents"),
        ('{"text": "one"}\n{"text": "two"}\n', 0.001, r"none of its 2 documents is held out.*heldout_fraction=0\."),
        ('{"text": "one"}\n{"text": "two"}\n', 0.999, "all its 2 documents are held out"),
        ("\n", 0.5, "holds no document"),
        ('{"text": " "}\n', 0.5, "domain 'bad' has 0 different documents"),
        ('{"text": "one"}\n{"text": 2}\n', 0.5, "line 2"),
    ],
)
def test_mistakes_leave_nothing_behind(
    content: str, fraction: float, message: str, small_sources: Sources, tmp_path: Path, workspace: Workspace
) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    sources = {**small_sources, "bad": (Files(files=str(tmp_path / "bad.jsonl")),)}
    config = DataConfig(name="x", vocab_size=300, heldout_fraction=fraction)
    with pytest.raises(ValueError, match=message) as error:
        prepare(config, {"bad": sources["bad"], **small_sources}, tmp_path / "new" / "out", workspace)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_the_suggested_fraction_works(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    sources = {"a": (Files(files=str(tmp_path / "a.jsonl")),)}
    with pytest.raises(ValueError, match="heldout_fraction=") as error:
        prepare(DataConfig(name="x", heldout_fraction=1e-6), sources, tmp_path / "out", workspace)
    fraction = float(str(error.value).rpartition("=")[2])
    assert prepare(DataConfig(name="x", heldout_fraction=fraction), sources, tmp_path / "out", workspace)


def test_sizes_can_be_capped(text_files: Path, tmp_path: Path, workspace: Workspace) -> None:
    config = DataConfig(name="x", vocab_size=300, heldout_fraction=0.3, max_bytes=3000, tokenizer_bytes=500)
    sources = {"law": (Files(files=str(text_files / "law.jsonl")), Files(files=str(text_files / "code.jsonl")))}
    prepare(config, sources, tmp_path / "out", workspace)
    dataset = open_dataset(tmp_path / "out")
    assert 3000 <= dataset.bytes("law", "train") + dataset.bytes("law", "heldout") < 3600
    assert len(dataset.manifest["domains"][0]["sources"]) == 1  # the second was not reached


def test_progress_ends_where_it_should(small_config: DataConfig, small_sources: Sources, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    workspace = Workspace(cache=tmp_path / "cache", progress=lambda *call: calls.append(call))
    prepare(small_config, small_sources, tmp_path / "out", workspace)
    last = {stage: (done, total) for stage, done, total in calls}
    assert all(done == total for done, total in last.values())
    stages = list(dict.fromkeys(stage for stage, *_ in calls))
    assert stages[:4] == ["reading fruit", "reading law", "reading code", "reading for the tokenizer"]
    assert "tokenising code.heldout" in stages


@pytest.mark.parametrize("name", ["../x", "a.b", "", "-a", "a b", "法"])
def test_domain_names_must_make_file_names(name: str, tmp_path: Path, workspace: Workspace) -> None:
    with pytest.raises(ValueError, match="domain name"):
        prepare(DataConfig(name="x"), {name: (Files(files="*"),)}, tmp_path / "out", workspace)


@pytest.mark.parametrize(
    "keys",
    [
        {"vocab_size": 257},
        {"heldout_fraction": 0.0},
        {"heldout_fraction": 1.0},
        {"max_bytes": 0},
        {"tokenizer_bytes": -1},
    ],
)
def test_settings_are_checked(keys: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(keys))):
        DataConfig(name="x", **keys)


def test_domains_without_sources_are_refused(tmp_path: Path, workspace: Workspace) -> None:
    with pytest.raises(ValueError, match="names no domain"):
        prepare(DataConfig(name="x"), {}, tmp_path / "out", workspace)
    with pytest.raises(ValueError, match="has no source"):
        prepare(DataConfig(name="x"), {"a": ()}, tmp_path / "out", workspace)


def test_what_fails_beside_the_spool_stays_the_very_error(tmp_path: Path) -> None:
    """By it processes know what all have raised together."""
    error = OSError("gone")
    with pytest.raises(OSError, match="gone") as caught, _spool_folder(tmp_path / "new" / "out"):
        raise error
    assert caught.value is error and not any(tmp_path.iterdir())
