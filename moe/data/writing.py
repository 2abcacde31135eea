"""From spooled documents to the files of a dataset: tokenizer, token files, token counts, dataset.json."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save
from tokenizers import Tokenizer

from ..storage.durable import DurableDirectory
from ..storage.hashing import FileRecord
from .config import DataConfig
from .dataset import FORMAT_VERSION, MANIFEST, SPLITS, TOKEN_COUNTS, TOKENIZER
from .indexed import IndexedWriter, token_dtype
from .progress import Progress
from .spool import DomainSpool
from .tokenizer import END_OF_TEXT, PADDING, encode_documents, special_id, train_tokenizer

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
    tokenizer: Tokenizer,
    stated: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Write a whole dataset; dataset.json comes last. `sources` a domain and `stated` go into it as they are."""
    directory.write(TOKENIZER, tokenizer.to_str(pretty=True).encode())
    counts: dict[str, NDArray[np.int64]] = {}
    domains = []
    for number, spool in enumerate(spools):
        splits = {}
        for split in SPLITS:
            splits[split], count_V = _write_split(directory, spool, split, tokenizer, progress)
            if split == "train":
                counts[spool.domain] = count_V
        entry = {"name": spool.domain, "id": number, "splits": splits}
        entry |= {"duplicates": spool.duplicates, "blank": spool.blank, "sources": sources[spool.domain]}
        domains.append(entry)
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
