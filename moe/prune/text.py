"""Calibration text: documents of some domains in a keyed order, packed as in training, a few sequences a batch.

No token is padding: what fills no sequence forms a shorter one of its own at the end.

Shape letters: B sequences, S positions, T tokens, N documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batch import Batch
from ..data.dataset import Dataset
from ..data.packing import Documents, Order, Rows, epoch_order, file_order, pack
from ..stored import StoredModel
from .jsonl import JsonlRows, model_tokenizer

_LENGTH = 2048  # positions of a sequence, where the model was trained on no fewer
_BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some tokens of one domain: the first `tokens` in the order."""

    domain: str
    id: int  # the model's
    documents: Documents
    order: Order
    tokens: int


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """Batches of text, made when asked for; `description` says in plain JSON data what text it is."""

    description: Mapping[str, Any]
    batch_size: int  # sequences
    parts: tuple[_Part, ...]
    cuts: tuple[tuple[tuple[int, int], ...], ...]  # of each batch, for each sequence its part and first token

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.cuts)

    def batch(self, index: int) -> Batch:
        """Return a batch, the same at each call."""
        cuts = self.cuts[index]
        length = min(self.description["sequence_length"], self.parts[cuts[0][0]].tokens - cuts[0][1])
        rows = Rows(*(np.zeros((len(cuts), length), np.int64) for _ in Rows._fields))
        for row, (part, begin) in enumerate(cuts):
            pack(self.parts[part].documents, self.parts[part].order, begin, Rows(*(array[row] for array in rows)))
        return Batch(
            token_BS=torch.from_numpy(rows.token_S),
            label_BS=torch.from_numpy(rows.label_S),
            start_BS=torch.from_numpy(rows.start_S),
            domain_B=torch.tensor([self.parts[part].id for part, _ in cuts]),
            sample_B=torch.arange(len(cuts)),
        )


def dataset_text(
    model: StoredModel,
    dataset: Dataset,
    *,
    domains: Sequence[str] = (),
    tokens: int,
    seed: int = 0,
    sequence_length: int | None = None,
    batch_size: int | None = None,
) -> CalibrationText:
    """Take training text of `domains` (none named: all), each an equal share of `tokens`, or all it has.

    The caller has compared the tokenizers. `sequence_length` is the model's where it is None, at most 2048. Raises
    ValueError for an unknown domain, or one that the model has no embedding for.
    """
    names = tuple(domains) or dataset.domain_names
    share = _share(tokens, names)
    parts = []
    for name in names:
        documents = dataset.domain(name).train
        order = epoch_order(documents, seed, name, 0)
        count = min(share, documents.num_tokens)
        parts.append(_Part(domain=name, id=_model_id(model, name), documents=documents, order=order, tokens=count))
    source = {"kind": "dataset", "name": dataset.path.name, "sha256": dataset.digest, "split": "train"}
    return _text(model, source, parts, seed, sequence_length, batch_size)


def jsonl_text(
    model: StoredModel,
    path: Path,
    *,
    domains: Sequence[str] = (),
    tokens: int,
    seed: int = 0,
    sequence_length: int | None = None,
    batch_size: int | None = None,
) -> CalibrationText:
    """Take documents out of a file of rows `{"text": ..., "domain": ...}`; without a domain they belong to `any`.

    They are tokenised as the model's tokenizer does it, special tokens included, and end with its end-of-text id where
    it has one. Otherwise as `dataset_text`. Raises ValueError for a model without a tokenizer, a file that cannot be
    read, and a bad row, by its number.
    """
    tokenizer, end = model_tokenizer(model)
    rows = JsonlRows(path)
    names = tuple(domains) or tuple(sorted(rows.offsets))
    share = _share(tokens, names)
    parts = []
    for name in names:
        documents = rows.encode(name, tokenizer, end, share, seed)
        largest = int(documents.tokens.max(initial=0))
        if largest >= model.config.vocab_size:
            size = model.config.vocab_size
            raise ValueError(f"{model.path}: its tokenizer gives id {largest}, its vocabulary has {size}")
        count = min(share, documents.num_tokens)
        part = _Part(
            domain=name, id=_model_id(model, name), documents=documents, order=file_order(documents), tokens=count
        )
        parts.append(part)
    source = {"kind": "jsonl", "name": path.name, "sha256": rows.sha256}
    return _text(model, source, parts, seed, sequence_length, batch_size)


def _share(tokens: int, names: Sequence[str]) -> int:
    if len(set(names)) != len(names):
        raise ValueError(f"name each domain once, got {', '.join(names)}")
    if tokens < len(names):
        raise ValueError(f"tokens must be at least 1 a domain, got {tokens} for {len(names)}")
    return tokens // len(names)


def _model_id(model: StoredModel, name: str) -> int:
    return model.registry.id_of(name) if model.needs_domain else 0


def _text(
    model: StoredModel,
    source: Mapping[str, Any],
    parts: Sequence[_Part],
    seed: int,
    sequence_length: int | None,
    batch_size: int | None,
) -> CalibrationText:
    length = sequence_length or min(model.sequence_length or _LENGTH, _LENGTH)
    batch_size = batch_size or max(1, _BATCH_TOKENS // length)
    description = {
        **source,
        "domains": {part.domain: part.tokens for part in parts},
        "tokens": sum(part.tokens for part in parts),
        "sequence_length": length,
        "seed": seed,
    }
    # Domain by domain in turn, so that a batch holds all of them.
    longest = max(part.tokens for part in parts)
    full = [
        (number, begin)
        for begin in range(0, longest, length)
        for number, part in enumerate(parts)
        if begin + length <= part.tokens
    ]
    cuts = [tuple(full[first : first + batch_size]) for first in range(0, len(full), batch_size)]
    rests = [(number, part.tokens - part.tokens % length) for number, part in enumerate(parts) if part.tokens % length]
    cuts += [(rest,) for rest in rests]
    if not cuts:
        raise ValueError(f"{source['name']} holds no text: give another file")
    return CalibrationText(description=description, batch_size=batch_size, parts=tuple(parts), cuts=tuple(cuts))
