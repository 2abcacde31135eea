"""A directory that several processes fill: the bytes of one, each file by one of them, whole or not at all."""

from functools import partial

import pytest
import torch

from sigmoe.moe.storage import shared
from sigmoe.moe.storage.durable import DurableDirectory, durable_directory
from sigmoe.moe.storage.resumable import ResumableDirectory, resumable_directory
from sigmoe.moe.storage.shared import TensorFiles, shared_directory
from sigmoe.moe.storage.tensors import named_tensors
from sigmoe.moe.workers import ALONE

TENSORS = {f"layers.{number}.weight": torch.arange(256.0) + number for number in range(5)}
FILE_BYTES = 2048  # two tensors a file, so three files


def write(workers, made, other, documents=lambda: None):
    """Returns the tensors' hashes and what this process has heard, in bytes."""
    heard = []
    files = TensorFiles("model", named_tensors(TENSORS), max_file_bytes=FILE_BYTES)
    with shared_directory(workers, made, other) as directory:
        hashes = files.write(directory, workers, documents, lambda *counts: heard.append(counts))
        return hashes, sorted(directory.records), heard


def durable(path, documents=lambda: None):
    """What each worker runs; one context alone is entered."""
    return lambda workers: write(workers, durable_directory(path), DurableDirectory, documents)


def bytes_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_several_write_the_bytes_of_one(in_threads, tmp_path, monkeypatch):
    hashes, names, _ = durable(tmp_path / "one")(ALONE)
    wrote, copy = [], shared.copy_tensor_file
    monkeypatch.setattr(
        shared, "copy_tensor_file", lambda *args, **keys: (wrote.append(args[2].name), copy(*args, **keys))
    )
    first, second = in_threads(2, durable(tmp_path / "two"))
    assert first[:2] == second[:2] == (hashes, names) and len(names) == 4
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")
    assert len(wrote) == len(set(wrote)) == 3
    assert [told[2][-1] for told in (first, second)] == [(3 * 1024, 3 * 1024), (2 * 1024, 2 * 1024)]


def test_what_one_cannot_write_none_has(in_threads, tmp_path):
    def refuse():
        raise ValueError("no document")

    assert [str(error) for error in in_threads(2, durable(tmp_path / "two", refuse))] == ["no document"] * 2
    assert not any(tmp_path.iterdir())


def test_what_stands_is_refused_by_all(in_threads, tmp_path):
    (tmp_path / "two").mkdir()
    for error in in_threads(2, durable(tmp_path / "two")):
        assert isinstance(error, ValueError) and "exists already" in str(error)


def test_finished_files_are_not_written_again(in_threads, tmp_path, monkeypatch):
    copy = shared.copy_tensor_file

    def work(workers):
        made = resumable_directory(tmp_path / "two", {"a": 1})
        return write(workers, made, partial(ResumableDirectory, rank=workers.rank))

    def fails_once(directory, folder, file, *args, **keys):
        if file.name.startswith("model-00003"):
            raise OSError("torn")
        copy(directory, folder, file, *args, **keys)

    monkeypatch.setattr(shared, "copy_tensor_file", fails_once)
    assert [str(error) for error in in_threads(2, work)] == ["torn"] * 2
    wrote = []
    monkeypatch.setattr(
        shared, "copy_tensor_file", lambda *args, **keys: (wrote.append(args[2].name), copy(*args, **keys))
    )
    (hashes, _, heard), (also, _, _) = in_threads(2, work)
    assert wrote == ["model-00003-of-00003.safetensors"] and heard[-1] == (3 * 1024, 3 * 1024)
    assert hashes == also == durable(tmp_path / "one")(ALONE)[0]
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


@pytest.mark.parametrize("folder", [".", "model"])
def test_where_the_files_lie(tmp_path, folder):
    with durable_directory(tmp_path / "one") as directory:
        files = TensorFiles(folder, named_tensors(TENSORS), hash_tensors=False)
        assert files.write(directory, ALONE, lambda: None, lambda done, total: None) == {}
    assert (tmp_path / "one" / folder / "model.safetensors.index.json").is_file()
