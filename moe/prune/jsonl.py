"""Calibration text from a file of rows `{"text": ..., "domain": ...}`, tokenised as the model's own tokenizer does it.

Shape letters: N documents.
"""

import hashlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..data.files import parse_row, text_of
from ..data.tokenizer import END_OF_TEXT, parse_tokenizer
from ..keyed import keyed_permutation
from ..stored import ANY_DOMAIN, StoredModel, read_json


@dataclass(frozen=True, kw_only=True)
class EncodedDocuments:
    """`Documents` in memory: ids end to end, and lengths `[N]`."""

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """The sum of the lengths."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """N."""
        return len(self.lengths)

    def starts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the documents begin in `tokens`."""
        starts: NDArray[np.int64] = (np.cumsum(self.lengths) - self.lengths)[documents]
        return starts


class JsonlRows:
    """The rows of a file, read once: where each domain's begin (`any`: of no domain), and the file's SHA-256.

    Raises ValueError for a file that cannot be read, and a bad row, by its number.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.offsets: dict[str, array[int]] = {}
        digest, offset = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        domain = self._row(line, number, offset).get("domain", ANY_DOMAIN)
                        if not isinstance(domain, str) or not domain:
                            raise ValueError(f"{path}, line {number}: domain must be a name, got {domain!r}")
                        self.offsets.setdefault(domain, array("q")).append(offset)
                    digest.update(line)
                    offset += len(line)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        if not self.offsets:
            raise ValueError(f"{path} holds no row: give a file of rows with a text each")
        self.sha256 = digest.hexdigest()

    def encode(self, domain: str, tokenizer: Tokenizer, end: int | None, tokens: int, seed: int) -> EncodedDocuments:
        """Tokenise documents of `domain`, in an order keyed by `seed`, until there are at least so many tokens.

        Each gets the tokenizer's special tokens, and ends with the id `end` (None: as it ends). Raises ValueError for
        a domain without rows.
        """
        if domain not in self.offsets:
            raise ValueError(
                f"{self._path} has no text of domain {domain!r}, only of {', '.join(sorted(self.offsets))}"
            )
        offsets, ids, lengths = self.offsets[domain], array("q"), array("q")
        with self._path.open("rb") as file:
            for place in keyed_permutation(len(offsets), "calibration", seed, domain).tolist():
                file.seek(offsets[place])
                encoded = tokenizer.encode(self._row(file.readline(), 0, offsets[place])["text"]).ids
                if end is not None and encoded[-1:] != [end]:
                    encoded.append(end)
                if encoded:
                    ids.extend(encoded)
                    lengths.append(len(encoded))
                if len(ids) >= tokens:
                    break
        return EncodedDocuments(tokens=np.array(ids, np.int64), lengths=np.array(lengths, np.int64))

    def _row(self, line: bytes, number: int, offset: int) -> dict[str, Any]:
        row = parse_row(line, self._path, number, offset)
        if "text" not in row:
            known = ", ".join(sorted(row)) or "none"
            raise ValueError(f"{self._path}, line {number}: no field 'text' (fields: {known})")
        text_of(row, "text", f"{self._path}, line {number}")
        return row


def model_tokenizer(model: StoredModel) -> tuple[Tokenizer, int | None]:
    """Return the model's tokenizer and the id that ends a document, if any; ValueError without a tokenizer."""
    if model.tokenizer is None:
        raise ValueError(f"{model.path} has no tokenizer.json to read text with: give a prepared dataset")
    tokenizer = parse_tokenizer(model.tokenizer, f"{model.path}/tokenizer.json")
    end = tokenizer.token_to_id(END_OF_TEXT)
    if model.format != "sigmoe":
        said = read_json(model.path / "config.json").get("eos_token_id")
        said = said[0] if isinstance(said, list) and said else said
        end = said if isinstance(said, int) else end
    if end is not None and end >= model.config.vocab_size:
        raise ValueError(f"{model.path}: its end-of-text id is {end}, its vocabulary has {model.config.vocab_size}")
    return tokenizer, end
