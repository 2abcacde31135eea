"""Held-out loss by domain."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..moe.batch import IGNORED
from ..moe.data.loader import BatchLoader
from ..moe.model import Transformer


@dataclass(frozen=True, kw_only=True)
class DomainLoss:
    """Summed loss (nats) over the labelled held-out tokens of a domain, and the bytes that these tokens spell."""

    loss_sum: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Mean loss a token, nats."""
        return self.loss_sum / self.tokens

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


@torch.no_grad()
def evaluate_domains(
    model: Transformer,
    loader: BatchLoader,
    *,
    batch_size: int,
    max_tokens: int,
    on_domain: Callable[[str], None] = lambda name: None,
) -> dict[str, DomainLoss]:
    """Return every domain's held-out loss over at the most `max_tokens` tokens. `on_domain` hears who comes next."""
    token_bytes = torch.from_numpy(loader.dataset.token_bytes())
    device = next(model.parameters()).device
    losses = {}
    for name in loader.dataset.domain_names:
        on_domain(name)
        loss_sum, tokens, num_bytes = 0.0, 0, 0
        for batch in loader.heldout_batches(name, batch_size, max_tokens):
            here = batch.to(device)
            output = model(here.token_BS, start_BS=here.start_BS, domain_B=batch.domain_B, label_BS=here.label_BS)
            assert output.loss_BS is not None
            labelled: Tensor = batch.label_BS != IGNORED
            loss_sum += float(output.loss_BS.double().sum())
            tokens += int(labelled.sum())
            num_bytes += int(token_bytes[batch.label_BS[labelled]].sum())
        losses[name] = DomainLoss(loss_sum=loss_sum, tokens=tokens, bytes=num_bytes)
    return losses
