from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sigmoe.moe.data.dataset import Dataset
from sigmoe.moe.data.tokenizer import (
    END_OF_TEXT,
    PADDING,
    encode_documents,
    open_tokenizer,
    special_id,
    train_tokenizer,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizer(dataset: Dataset) -> Tokenizer:
    return open_tokenizer(dataset.tokenizer_path)


def documents_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    documents = []
    for token_T, lengths in encode_documents(tokenizer, texts):
        assert sum(lengths) == len(token_T)
        begin = 0
        for length in lengths:
            documents.append(token_T[begin : begin + length].tolist())
            begin += length
    return documents


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXT, max_size=5))
def test_any_text_comes_back_exactly(tokenizer: Tokenizer, texts: list[str]) -> None:
    end = special_id(tokenizer, END_OF_TEXT)
    documents = documents_of(tokenizer, texts)
    assert [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents] == texts
    assert all(ids[-1] == end and end not in ids[:-1] for ids in documents)


@pytest.mark.parametrize("token", [END_OF_TEXT, PADDING])
def test_the_text_of_a_special_token_is_ordinary_text(tokenizer: Tokenizer, token: str) -> None:
    text = f"{token}a{token}{token} b\n{token}"
    (ids,) = documents_of(tokenizer, [text])
    special = {special_id(tokenizer, END_OF_TEXT), special_id(tokenizer, PADDING)}
    assert special.isdisjoint(ids[:-1])
    assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == text


def test_special_tokens_come_first(tokenizer: Tokenizer) -> None:
    assert special_id(tokenizer, END_OF_TEXT) == 0
    assert special_id(tokenizer, PADDING) == 1
    with pytest.raises(ValueError, match="no '<mask>'"):
        special_id(tokenizer, "<mask>")


def test_batches_and_pieces_change_nothing(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", "one\n", "a long line " * 40, "lines\n" * 50 + "end", "第一条\n" * 30, "x" * 200]
    whole = documents_of(tokenizer, texts)
    assert whole == [[*tokenizer.encode(text, add_special_tokens=False).ids, 0] for text in texts]
    monkeypatch.setattr("sigmoe.moe.data.tokenizer._BATCH_CHARACTERS", 150)
    assert documents_of(tokenizer, texts) == whole
    monkeypatch.setattr("sigmoe.moe.data.tokenizer._PIECE_CHARACTERS", 60)
    cut = documents_of(tokenizer, texts)
    assert [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in cut] == texts


def test_training_is_deterministic_and_streams() -> None:
    def texts():
        yield from (f"the number {i} of {i * i}\n" for i in range(500))

    first = train_tokenizer(texts(), 320)
    assert first.to_str() == train_tokenizer(texts(), 320).to_str()
    assert first.get_vocab_size() == 320
    assert len(set(first.get_vocab().values())) == 320


def test_little_text_gives_a_smaller_vocabulary() -> None:
    assert train_tokenizer(iter(["ab"]), 4096).get_vocab_size() == 258


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        open_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        open_tokenizer(tmp_path / "tokenizer.json")
