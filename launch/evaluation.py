"""Held-out loss by domain.

Shape letters: B sequences, S positions, N documents.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..moe.batch import IGNORED, Batch
from ..moe.data.dataset import Dataset
from ..moe.data.loader import BatchLoader, heldout_batches
from ..moe.model import Transformer
from ..parallel.collectives import all_reduce
from ..parallel.mesh import Axis

Route = int | NDArray[np.int64]  # the model's domain id for a whole text, or one a document of it, `[N]`


@dataclass(frozen=True, kw_only=True)
class DomainLoss:
    """Summed loss (nats) over the labelled held-out tokens of a domain, and the bytes that these tokens spell."""

    loss_sum: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Mean loss a token, nats; NaN where there is none."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits over the bytes of the labelled tokens; NaN where they are end-of-text ids alone, of 0 bytes."""
        return self.loss_sum / math.log(2) / self.bytes if self.bytes else math.nan

    def to_json(self) -> dict[str, float | int | None]:
        """Return plain JSON data; a loss that is not finite is null."""
        loss_sum = self.loss_sum if math.isfinite(self.loss_sum) else None
        return {"loss_sum": loss_sum, "tokens": self.tokens, "bytes": self.bytes}

    @staticmethod
    def from_json(data: Any) -> "DomainLoss":
        """Read what `to_json` gave."""
        loss_sum = math.nan if data["loss_sum"] is None else float(data["loss_sum"])
        return DomainLoss(loss_sum=loss_sum, tokens=int(data["tokens"]), bytes=int(data["bytes"]))


Losses = Mapping[str, DomainLoss]


@dataclass(frozen=True, kw_only=True)
class HeldoutSettings:
    """How held-out text is cut into batches: equal settings give every model the very same ones."""

    batch_size: int
    sequence_length: int
    max_tokens: int | None  # of a domain, from its beginning; None: all

    def batches(self, dataset: Dataset, text: str) -> Iterator[Batch]:
        """Yield the batches of domain `text`."""
        return heldout_batches(
            dataset,
            text,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            max_tokens=self.max_tokens,
        )

    def num_tokens(self, dataset: Dataset, text: str) -> int:
        """Return how many tokens of domain `text` are read."""
        there = dataset.domain(text).heldout.num_tokens
        return there if self.max_tokens is None else min(self.max_tokens, there)

    def num_batches(self, dataset: Dataset, text: str) -> int:
        """Return how many batches `batches` yields."""
        sequences = -(-self.num_tokens(dataset, text) // self.sequence_length)
        return -(-sequences // self.batch_size)

    def num_documents(self, dataset: Dataset, text: str) -> int:
        """Return how many documents of domain `text` are read, the last one perhaps not to its end."""
        end_N = np.cumsum(dataset.domain(text).heldout.lengths, dtype=np.int64)
        return int(np.searchsorted(end_N, self.num_tokens(dataset, text))) + 1


@torch.no_grad()
def text_losses(
    model: Transformer,
    dataset: Dataset,
    text: str,
    routes: Sequence[Route],
    settings: HeldoutSettings,
    on_batch: Callable[[], None] = lambda: None,
    dp: Axis | None = None,
) -> list[DomainLoss]:
    """Return the loss of the held-out documents of domain `text` under each of `routes`.

    The model runs a batch once a domain, whole: so a token's loss under a domain is the same whichever route asks.
    With `dp` each of its ranks runs its rows of every batch, and all get the sums.
    """
    token_bytes = torch.from_numpy(dataset.token_bytes())
    end_N = np.cumsum(dataset.domain(text).heldout.lengths, dtype=np.int64)
    sums, tokens, num_bytes = [0.0] * len(routes), 0, 0
    for whole in settings.batches(dataset, text):
        batch = whole if dp is None else _share(whole, dp)
        position_BS = batch.sample_B[:, None].numpy() * settings.sequence_length + np.arange(settings.sequence_length)
        document_BS = np.searchsorted(end_N, position_BS, side="right")
        for number, loss_BS in enumerate(_batch_losses(model, batch, routes, document_BS)):
            sums[number] += float(loss_BS.double().sum())
        labelled: Tensor = batch.label_BS != IGNORED
        tokens += int(labelled.sum())
        num_bytes += int(token_bytes[batch.label_BS[labelled]].sum())
        on_batch()
    if dp is not None and dp.size > 1:
        total = all_reduce(torch.tensor([*sums, tokens, num_bytes], dtype=torch.float64), dp).tolist()
        *sums, tokens, num_bytes = *total[:-2], int(total[-2]), int(total[-1])
    return [DomainLoss(loss_sum=loss_sum, tokens=tokens, bytes=num_bytes) for loss_sum in sums]


def _share(batch: Batch, dp: Axis) -> Batch:
    rows = batch.token_BS.shape[0] // dp.size
    return batch.rows(dp.rank * rows, (dp.rank + 1) * rows)


def _batch_losses(
    model: Transformer, batch: Batch, routes: Sequence[Route], document_BS: NDArray[np.int64]
) -> list[Tensor]:
    """Return each token's loss under each of `routes`, fp32 `[B, S]` each; what lies behind the text is padding."""
    here = batch.to(next(model.parameters()).device)
    known: dict[int, Tensor] = {}

    def under(domain: int) -> Tensor:
        if domain not in known:
            domain_B = torch.full_like(here.domain_B, domain)
            output = model(here.token_BS, start_BS=here.start_BS, domain_B=domain_B, label_BS=here.label_BS)
            assert output.loss_BS is not None
            known[domain] = output.loss_BS
        return known[domain]

    losses = []
    for route in routes:
        if isinstance(route, int):
            losses.append(under(route))
            continue
        domain_BS = route[np.minimum(document_BS, len(route) - 1)]
        loss_BS = torch.zeros(domain_BS.shape, device=here.token_BS.device)
        for domain in np.unique(domain_BS).tolist():
            loss_BS = torch.where(torch.from_numpy(domain_BS == domain).to(loss_BS.device), under(domain), loss_BS)
        losses.append(loss_BS)
    return losses


def evaluate_domains(
    model: Transformer,
    loader: BatchLoader,
    *,
    batch_size: int,
    max_tokens: int,
    on_domain: Callable[[str], None] = lambda name: None,
    dp: Axis | None = None,
) -> dict[str, DomainLoss]:
    """Return every domain's held-out loss over at the most `max_tokens` tokens; ids are the dataset's own.

    `on_domain` hears who comes next. `batch_size` is that of all ranks of `dp` together.
    """
    settings = HeldoutSettings(batch_size=batch_size, sequence_length=loader.sequence_length, max_tokens=max_tokens)
    losses = {}
    for name in loader.dataset.domain_names:
        on_domain(name)
        routes = [loader.dataset.domain(name).id]
        (losses[name],) = text_losses(model, loader.dataset, name, routes, settings, dp=dp)
    return losses
