"""Small token files and a small prepared dataset."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from sigmoe.moe.data.config import DataConfig
from sigmoe.moe.data.dataset import Dataset, open_dataset
from sigmoe.moe.data.files import Files
from sigmoe.moe.data.indexed import IndexedDocuments, IndexedWriter
from sigmoe.moe.data.prepare import prepare
from sigmoe.moe.data.source import Workspace

WriteDocuments = Callable[[Path, Sequence[Sequence[int]]], IndexedDocuments]


@pytest.fixture(scope="session")
def write_documents() -> WriteDocuments:
    def write(bin_path: Path, documents: Sequence[Sequence[int]]) -> IndexedDocuments:
        with bin_path.open("wb") as file:
            writer = IndexedWriter(file, np.dtype("<u2"))
            for document in documents:
                writer.add(np.array(document), [len(document)])
        with bin_path.with_suffix(".idx").open("wb") as file:
            writer.write_index(file)
        return IndexedDocuments(bin_path)

    return write


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    """Documents of three domains, of very different sizes, with text that is not ASCII."""
    rng = np.random.default_rng(0)
    words = {
        "fruit": ["apple", "pear", "plum", "fig", "<|endoftext|>", "ripe"],
        "law": list("第条规定应当依照中华人民共和国法律"),
        "code": ["def f(x):\n", "    return x\n", "\tif True:\r\n", "pass\n", "# café\n"],
    }
    return {
        name: [" ".join(rng.choice(vocabulary, int(rng.integers(1, 120)))) for _ in range(60)]
        for name, vocabulary in words.items()
    }


@pytest.fixture(scope="session")
def text_files(texts: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one .jsonl a domain."""
    folder = tmp_path_factory.mktemp("texts")
    for name, documents in texts.items():
        rows = [json.dumps({"text": text}, ensure_ascii=name == "law") + "\n" for text in documents]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_config() -> DataConfig:
    return DataConfig(name="small", vocab_size=400, heldout_fraction=0.2)


@pytest.fixture(scope="session")
def small_sources(text_files: Path) -> dict[str, tuple[Files, ...]]:
    return {name: (Files(files=str(text_files / f"{name}.jsonl")),) for name in ("fruit", "law", "code")}


@pytest.fixture(scope="session")
def dataset(
    small_config: DataConfig, small_sources: dict[str, tuple[Files, ...]], tmp_path_factory: pytest.TempPathFactory
) -> Dataset:
    folder = tmp_path_factory.mktemp("dataset")
    assert prepare(small_config, small_sources, folder / "small", Workspace(cache=folder / "cache"))
    return open_dataset(folder / "small")
