"""From spooled documents to the files of a dataset: tokenizer, token files, token counts, dataset.json."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save
from tokenizers import Tokenizer

from ..storage.durable import DurableDirectory
from ..storage.hashing import FileRecord, write_errors
from ..workers import ALONE, Workers
from .config import DataConfig
from .dataset import FORMAT_VERSION, MANIFEST, SPLITS, TOKEN_COUNTS, TOKENIZER
from .indexed import IndexedWriter, token_dtype
from .progress import Progress
from .spool import DomainSpool
from .tokenizer import END_OF_TEXT, PADDING, encode_documents, parse_tokenizer, special_id, train_tokenizer

_REPORT_CHARACTERS = 1 << 18


def train_on(spools: Sequence[DomainSpool], config: DataConfig, progress: Progress) -> Tokenizer:
    """Train the tokenizer on the training split of every domain, streamed, at most `tokenizer_bytes` of each."""
    limit = config.tokenizer_bytes
    sizes = [spool.counts["train"].bytes for spool in spools]
    total = sum(size if limit is None else min(size, limit) for size in sizes)
    learning = "learning the tokenizer"

    def texts() -> Iterator[str]:
        yield from (text for spool in spools for text in spool.texts("train", limit))
        progress(learning, 0, None)

    tokenizer = train_tokenizer(_watched(texts(), "reading for the tokenizer", total, progress), config.vocab_size)
    progress(learning, 1, 1)
    return tokenizer


def write_dataset(
    directory: DurableDirectory,
    spools: Sequence[DomainSpool],
    sources: Mapping[str, Sequence[Mapping[str, Any]]],
    tokenizer: str,
    stated: Mapping[str, Any],
    progress: Progress,
    workers: Workers = ALONE,
) -> None:
    """Write a whole dataset, its domains shared among the processes; dataset.json comes last, by the first of them.

    `tokenizer` is the content of tokenizer.json; `sources` a domain and `stated` go into dataset.json as they are.
    """
    opened = parse_tokenizer(tokenizer.encode(), TOKENIZER)

    def write(spool: DomainSpool) -> dict[str, Any]:
        with write_errors(directory.root):
            return _write_domain(directory, spool, opened, progress)

    # The largest first, so that the shares are about equal.
    ordered = sorted(spools, key=lambda spool: -spool.bytes)
    written = dict(zip((spool.domain for spool in ordered), workers.spread(write, ordered)))
    entries = [
        {"name": spool.domain, "id": number, "splits": written[spool.domain]["splits"]}
        | {"duplicates": spool.duplicates, "blank": spool.blank, "sources": sources[spool.domain]}
        for number, spool in enumerate(spools)
    ]
    counts = {spool.domain: np.array(written[spool.domain]["train_V"], np.int64) for spool in spools}
    workers.from_first(lambda: _finish(directory, tokenizer, opened, entries, counts, stated))


def _finish(
    directory: DurableDirectory,
    text: str,
    tokenizer: Tokenizer,
    domains: Sequence[Mapping[str, Any]],
    counts: dict[str, NDArray[np.int64]],
    stated: Mapping[str, Any],
) -> None:
    """Write the files that all domains share."""
    directory.write(TOKENIZER, text.encode())
    directory.write(TOKEN_COUNTS, save(counts))
    manifest = {
        "format_version": FORMAT_VERSION,
        "vocab_size": tokenizer.get_vocab_size(),
        "end_of_text": special_id(tokenizer, END_OF_TEXT),
        "padding": special_id(tokenizer, PADDING),
        "tokenizer": _as_json(directory.records[TOKENIZER]),
        "token_counts": _as_json(directory.records[TOKEN_COUNTS]),
        "domains": domains,
        **stated,
    }
    directory.write(MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())


def write_token_files(
    directory: DurableDirectory, stem: str, texts: Iterable[str], tokenizer: Tokenizer
) -> tuple[int, NDArray[np.int64]]:
    """Tokenise documents in chunks into `<stem>.bin` and `.idx`; return their number and each id's, int64 `[V]`."""
    vocab_size = tokenizer.get_vocab_size()
    count_V = np.zeros(vocab_size, np.int64)
    with directory.open(f"{stem}.bin") as sink:
        writer = IndexedWriter(sink, token_dtype(vocab_size))
        for token_T, lengths in encode_documents(tokenizer, texts):
            writer.add(token_T, lengths)
            count_V += np.bincount(token_T, minlength=vocab_size)
    with directory.open(f"{stem}.idx") as sink:
        writer.write_index(sink)
    return writer.num_documents, count_V


def _write_domain(
    directory: DurableDirectory, spool: DomainSpool, tokenizer: Tokenizer, progress: Progress
) -> dict[str, Any]:
    """Write both splits; return their entries of dataset.json and `train_V`, the ids' numbers, as plain JSON data."""
    written = {split: _write_split(directory, spool, split, tokenizer, progress) for split in SPLITS}
    splits = {split: entry for split, (entry, _) in written.items()}
    return {"splits": splits, "train_V": written["train"][1].tolist()}


def _write_split(
    directory: DurableDirectory, spool: DomainSpool, split: str, tokenizer: Tokenizer, progress: Progress
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """Write one split; return its entry of dataset.json and the ids' numbers."""
    stem, size = f"{spool.domain}.{split}", spool.counts[split].bytes
    texts = _watched(spool.texts(split), f"tokenising {stem}", size, progress)
    documents, count_V = write_token_files(directory, stem, texts, tokenizer)
    files = {name: _as_json(directory.records[name]) for name in (f"{stem}.bin", f"{stem}.idx")}
    return {"documents": documents, "bytes": size, "tokens": int(count_V.sum()), "files": files}, count_V


def _watched(texts: Iterable[str], stage: str, total: int, progress: Progress) -> Iterator[str]:
    """Pass texts on and report the bytes that went by."""
    done, pending = 0, 0
    progress(stage, 0, total)
    for text in texts:
        yield text
        pending += len(text)
        done += len(text.encode("utf-8"))
        if pending >= _REPORT_CHARACTERS:
            pending = 0
            progress(stage, min(done, total), total)
    progress(stage, total, total)


def _as_json(record: FileRecord) -> dict[str, Any]:
    return {"size": record.size, "sha256": record.sha256}
