import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sigmoe.moe.data.dataset import Dataset, open_dataset


@pytest.fixture
def copy(dataset: Dataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.path, tmp_path / "copy"))


def test_counts_and_bytes_agree_with_the_files(dataset: Dataset) -> None:
    size_V = dataset.token_bytes()
    assert size_V[[dataset.end_of_text, dataset.padding]].tolist() == [0, 0]
    assert (np.delete(size_V, [dataset.end_of_text, dataset.padding]) > 0).all()
    for name in dataset.domain_names:
        domain = dataset.domain(name)
        counted = np.bincount(domain.train.tokens, minlength=dataset.vocab_size)
        assert dataset.token_counts(name).tolist() == counted.tolist()
        for split in ("train", "heldout"):
            documents = getattr(domain, split)
            assert dataset.bytes(name, split) == int(size_V[documents.tokens].sum())
            ends = documents.starts(np.arange(documents.num_documents)) + documents.lengths - 1
            assert (documents.tokens[ends] == dataset.end_of_text).all()
            assert (documents.tokens == dataset.end_of_text).sum() == documents.num_documents


def test_verify_reports_what_it_reads(dataset: Dataset) -> None:
    seen: list[tuple[str, int, int | None]] = []
    dataset.verify(lambda *call: seen.append(call))
    assert (
        seen[-1][1]
        == seen[-1][2]
        == sum(f.stat().st_size for f in dataset.path.iterdir()) - (dataset.path / "dataset.json").stat().st_size
    )


@pytest.mark.parametrize("file", ["tokenizer.json", "token_counts.safetensors", "law.train.bin", "law.heldout.idx"])
def test_one_flipped_bit_is_found(file: str, copy: Path) -> None:
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / file).write_bytes(content)
    with pytest.raises(ValueError, match=file.partition(".")[0]):
        open_dataset(copy).verify()


@pytest.mark.parametrize("file", ["tokenizer.json", "token_counts.safetensors", "law.train.bin", "law.heldout.idx"])
def test_missing_and_short_files_are_refused(file: str, copy: Path) -> None:
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[:-2])
    with pytest.raises(ValueError, match=f"{file} has .* damaged"):
        open_dataset(copy)
    (copy / file).unlink()
    with pytest.raises(ValueError, match=f"{file} is missing"):
        open_dataset(copy)


def test_ids_beyond_the_vocabulary_are_found_at_the_start(copy: Path) -> None:
    content = bytearray((copy / "law.train.bin").read_bytes())
    content[6:8] = (40_000).to_bytes(2, "little")
    (copy / "law.train.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"law\.train\.bin: id 40000 at byte 6 is beyond the vocabulary"):
        open_dataset(copy)
    assert open_dataset(copy, check_ids=False).domain_names == ("fruit", "law", "code")


def _drop(key: str) -> Callable[[dict], object]:
    return lambda manifest: manifest.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "format version must be 1"),
        (_drop("format_version"), "format version must be 1"),
        (_drop("vocab_size"), "damaged"),
        (_drop("domains"), "damaged"),
        (_drop("tokenizer"), "damaged"),
        (lambda m: m["domains"][1].update(id=5), "has id 5 at place 1"),
        (lambda m: m["domains"][1]["splits"].pop("heldout"), "damaged"),
        (lambda m: m["domains"][1]["splits"]["train"].update(tokens=1), "damaged"),
        (lambda m: m["domains"][1]["splits"]["train"]["files"].update({"../x": {"size": 1}}), "not the name of a file"),
        (lambda m: m.update(domains=None), "damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(change: Callable[[dict], object], message: str, copy: Path) -> None:
    manifest = json.loads((copy / "dataset.json").read_text())
    change(manifest)
    (copy / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        open_dataset(copy)


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no dataset"):
        open_dataset(tmp_path / "missing")
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(ValueError, match="format version"):
        open_dataset(tmp_path)
