"""The byte-level BPE tokenizer: exact for any text, trained from a stream, applied in chunks."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"

# Words with the space or sign before them, at most three digits, runs of signs, line ends, spaces: as OpenAI's
# cl100k_base splits. Code keeps its indentation in few tokens this way.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A batch costs about 100 bytes of memory a token; a longer document is encoded in pieces.
_BATCH_CHARACTERS = 1 << 20
_PIECE_CHARACTERS = 1 << 16


class EncodedDocuments(NamedTuple):
    """Documents end to end, each with its end-of-text id: ids int64 `[T]`, lengths in tokens."""

    token_T: NDArray[np.int64]
    lengths: list[int]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a tokenizer of at most `vocab_size` entries (fewer if the text has no more pairs to merge).

    The special tokens have ids 0 (end of text) and 1 (padding).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return _literal(tokenizer)


def open_tokenizer(path: Path) -> Tokenizer:
    """Open tokenizer.json; see `parse_tokenizer`."""
    try:
        return parse_tokenizer(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def parse_tokenizer(data: bytes, name: str) -> Tokenizer:
    """Read a tokenizer, which errors call `name`. The text of a special token in a document is ordinary bytes."""
    try:
        return _literal(Tokenizer.from_str(data.decode("utf-8")))
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise ValueError(f"{name} is no tokenizer: {error}") from error


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[EncodedDocuments]:
    """Yield the documents as ids, about a megabyte of text at a time; a longer document is held as ids alone."""
    end_of_text = special_id(tokenizer, END_OF_TEXT)
    opened: list[NDArray[np.int64]] = []  # the document that the last batch left unfinished
    for pieces, is_last in _batches(texts):
        encodings = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        flat: list[int] = []
        ends: list[int] = []
        for encoding, last in zip(encodings, is_last):
            flat += encoding.ids
            if last:
                flat.append(end_of_text)
                ends.append(len(flat))
        token_T = np.array(flat, dtype=np.int64)
        if not ends:
            opened.append(token_T)
            continue
        carried = sum(map(len, opened))
        closed_T = np.concatenate([*opened, token_T[: ends[-1]]])
        yield EncodedDocuments(closed_T, np.diff(np.array(ends) + carried, prepend=0).tolist())
        opened = [token_T[ends[-1] :]]


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a special token; ValueError if the tokenizer has none."""
    id = tokenizer.token_to_id(token)
    if id is None:
        raise ValueError(f"the tokenizer has no {token!r}: prepare the dataset again")
    return id


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    # Not part of tokenizer.json: without it "<|endoftext|>" in a document would end it.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _batches(texts: Iterable[str]) -> Iterator[tuple[list[str], list[bool]]]:
    """Yield pieces of documents and whether each is the last of its document."""
    pieces: list[str] = []
    is_last: list[bool] = []
    characters = 0
    for text in texts:
        for piece, last in _pieces(text):
            pieces.append(piece)
            is_last.append(last)
            characters += len(piece)
            if characters >= _BATCH_CHARACTERS:
                yield pieces, is_last
                pieces, is_last, characters = [], [], 0
    if pieces:
        yield pieces, is_last


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Yield (piece, is the last of its document); cut after a line end where there is one."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = text.rfind("\n", start + 1, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield text[start:end], False
        start = end
    yield text[start:], True
