"""Settings of a dataset's preparation."""

from dataclasses import dataclass

# 256 bytes and the two special tokens.
MIN_VOCAB_SIZE = 258


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How to prepare a dataset.

    `max_bytes`: UTF-8 bytes of text to take a domain (None: all). `tokenizer_bytes`: how many of them, from the
    training split of each domain, the tokenizer learns from (None: all). `heldout_fraction`: share of the documents
    that is held out, chosen by a hash of `seed` and the text.
    """

    name: str
    vocab_size: int = 4096
    heldout_fraction: float = 0.09
    document_bytes: int | None = None
    max_bytes: int | None = None
    tokenizer_bytes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not MIN_VOCAB_SIZE <= self.vocab_size <= 1 << 24:
            raise ValueError(f"vocab_size must lie in {MIN_VOCAB_SIZE}..{1 << 24}, got {self.vocab_size}")
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction must lie between 0 and 1, got {self.heldout_fraction}")
        if self.document_bytes is not None and self.document_bytes < 256:
            raise ValueError(f"document_bytes must be at least 256 (or null for no limit), got {self.document_bytes}")
        for key in ("max_bytes", "tokenizer_bytes"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1 (or null for no limit), got {value}")
