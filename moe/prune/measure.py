"""What pruning costs on held-out text: losses of parent and pruned model, and how far they part token by token.

Shape letters: B sequences, S positions, N labelled tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import IGNORED
from ..data.dataset import Dataset
from ..paired import paired_logits
from ..stored import StoredModel
from ..streaming import RunnableModel, StreamedModel


@dataclass(frozen=True, kw_only=True)
class PruningLoss:
    """Means over the labelled held-out tokens of a domain; losses and `kl`, KL(parent || pruned), in nats a token."""

    domain: str
    tokens: int
    parent_loss: float
    pruned_loss: float
    kl: float
    agreement: float  # share of tokens for which both models' likeliest next token is the same

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, perplexities too; figures that are not finite are null."""
        figures = {
            "parent_loss": self.parent_loss,
            "pruned_loss": self.pruned_loss,
            "parent_perplexity": _exp(self.parent_loss),
            "pruned_perplexity": _exp(self.pruned_loss),
            "perplexity_ratio": _exp(self.pruned_loss - self.parent_loss),
            "kl": self.kl,
            "agreement": self.agreement,
        }
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        return {"domain": self.domain, "tokens": self.tokens, **finite}


def measure_domain(
    parent: StoredModel,
    pruned: RunnableModel,
    dataset: Dataset,
    domain: str,
    *,
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PruningLoss:
    """Compare both on at the most `max_tokens` held-out tokens of `domain`, each layer by layer in fp32.

    `progress` hears layers passed and in all. Raises ValueError for a domain that a model which needs one does not
    know.
    """
    id = parent.registry.id_of(domain) if parent.needs_domain else 0
    models = StreamedModel(parent, domains=[id]), StreamedModel(pruned, domains=[id])
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    pairs = paired_logits(parent, models, (id, id), dataset, domain, max_tokens=max_tokens, progress=progress)
    for batch, parent_BSV, pruned_BSV in pairs:
        labelled_BS = batch.label_BS != IGNORED
        sums += _sums(parent_BSV[labelled_BS], pruned_BSV[labelled_BS], batch.label_BS[labelled_BS])
        tokens += int(labelled_BS.sum())
    means = [total / tokens if tokens else math.nan for total in sums.tolist()]
    return PruningLoss(
        domain=domain, tokens=tokens, **dict(zip(("parent_loss", "pruned_loss", "kl", "agreement"), means))
    )


def _sums(parent_NV: Tensor, pruned_NV: Tensor, label_N: Tensor) -> Tensor:
    """Return both losses, the divergence and the agreements, summed in float64."""
    parent_logp, pruned_logp = (logits.double().log_softmax(1) for logits in (parent_NV, pruned_NV))
    losses = [-logp.gather(1, label_N[:, None]).sum() for logp in (parent_logp, pruned_logp)]
    kl = (parent_logp.exp() * (parent_logp - pruned_logp)).sum()
    agreed = (parent_NV.argmax(1) == pruned_NV.argmax(1)).double().sum()
    return torch.stack([*losses, kl, agreed])


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
