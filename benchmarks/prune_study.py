"""Finished runs of the pruning study: pruned for each domain by each criterion, unwritten, and run on held-out text."""

import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ..moe.batch import IGNORED, Batch
from ..moe.config import layer_experts
from ..moe.data.dataset import Dataset
from ..moe.data.loader import heldout_batches
from ..moe.extract import Submodel, plan_submodel
from ..moe.extract.unwritten import unwritten_model
from ..moe.prune.budget import Budget, Kept
from ..moe.prune.calibrate import calibrate
from ..moe.prune.choice import choose_kept, rate_experts
from ..moe.prune.criteria import CRITERIA, weight_saliency
from ..moe.prune.forecast import dropped_share, expected
from ..moe.prune.plan import plan_pruned
from ..moe.prune.sums import MOST_ENUMERATED, CalibrationSums
from ..moe.prune.text import dataset_text
from ..moe.stored import StoredModel, open_model
from ..moe.streaming import RunnableModel, StreamedModel
from ..parallel.checkpointer import Checkpointer

_BATCH = 16  # sequences


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A model that was pruned for `domain`."""

    run: str
    domain: str
    criterion: str
    pruned: float  # fraction of each layer's experts
    whole: float  # the domain's loss, unpruned, on held-out text, nats a token
    added: float  # to it
    dropped: float  # `dropped_share` of the calibration's sums
    forecast: float  # of `added`, from that
    outside: float | None  # perplexity over the unpruned model's, mean over the other domains; None: not measured


class Study:
    """A run, and the text that it is calibrated and measured on."""

    def __init__(self, run: str, name: str, dataset: Dataset, *, calibrate_tokens: int, evaluate_tokens: int) -> None:
        self.model, self.name = _newest(Path(run).expanduser()), name
        self._dataset, self._domains = dataset, dataset.domain_names
        self._calibrate_tokens, self._evaluate_tokens = calibrate_tokens, evaluate_tokens

    def losses(self, model: RunnableModel, domains: Sequence[str]) -> dict[str, float]:
        """Return each domain's held-out loss, nats a token, of the run's model or of one made of it."""
        texts = [(name, batch) for name in domains for batch in self._heldout(model, name)]
        streamed = StreamedModel(model)
        running = streamed.run_layers([batch for _, batch in texts])
        sums, tokens = dict.fromkeys(domains, 0.0), dict.fromkeys(domains, 0)
        for (name, batch), logits_BSV in zip(texts, streamed.run_head(running), strict=True):
            labels = batch.label_BS.flatten()
            loss = functional.cross_entropy(logits_BSV.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
            sums[name], tokens[name] = sums[name] + float(loss), tokens[name] + batch.num_labels
        return {name: sums[name] / tokens[name] for name in domains}

    def outcomes(self, shares: Sequence[float], *, outside: bool) -> Iterator[Outcome]:
        """Prune these fractions for every domain by every criterion; `outside`: measure the other domains too."""
        whole = self.losses(self.model, self._domains)
        for place, domain in enumerate(self._domains):
            heard = self._domains if outside else (domain,)
            sums, measured = self._calibrated(domain), dict[Kept, dict[str, float]]()
            for criterion, share, kept in self._choices(sums, shares, seed=place):
                if kept not in measured:
                    plan = plan_pruned(self.model.config, self.model.registry, kept)
                    losses = self.losses(unwritten_model(self.model, plan), heard)
                    measured[kept] = {name: losses[name] - whole[name] for name in heard}
                dropped = dropped_share(sums.layers, kept)
                others = [math.exp(added) for name, added in measured[kept].items() if name != domain]
                yield Outcome(
                    run=self.name,
                    domain=domain,
                    criterion=criterion,
                    pruned=share,
                    whole=whole[domain],
                    added=measured[kept][domain],
                    dropped=dropped,
                    forecast=expected(dropped).added,
                    outside=statistics.fmean(others) if others else None,
                )

    def exact_losses(self) -> dict[str, float]:
        """Return the held-out loss of each domain's exact submodel, which is cut out of a domain-routed run."""
        losses = dict[str, float]()
        for name, submodel in self.exact_plans().items():
            losses |= self.losses(unwritten_model(self.model, submodel), [name])
        return losses

    def exact_plans(self) -> dict[str, Submodel]:
        """Return each domain's exact submodel; ValueError where the run's router has none, or does not know it."""
        model = self.model
        return {name: plan_submodel(model.config, model.registry, [name]) for name in self._domains}

    @property
    def experts(self) -> int:
        """Experts of a layer that one domain's tokens can reach, the most of any."""
        domains = self.model.registry.domains
        return max(len(ids) for domain in domains for ids in domain.experts)

    def _heldout(self, model: RunnableModel, domain: str) -> Iterator[Batch]:
        """Yield the domain's held-out text as `model` knows the domain."""
        id, length = model.registry.id_of(domain), self.model.sequence_length
        assert length is not None  # a run's
        for batch in heldout_batches(
            self._dataset, domain, batch_size=_BATCH, sequence_length=length, max_tokens=self._evaluate_tokens
        ):
            yield replace(batch, domain_B=torch.full_like(batch.domain_B, id))

    def _calibrated(self, domain: str) -> CalibrationSums:
        text = dataset_text(self.model, self._dataset, domains=[domain], tokens=self._calibrate_tokens)
        with tempfile.TemporaryDirectory() as folder:
            return calibrate(self.model, text, Path(folder) / "work", subsets=self._enumerable)

    def _choices(
        self, sums: CalibrationSums, shares: Sequence[float], *, seed: int
    ) -> Iterator[tuple[str, float, Kept]]:
        for criterion in CRITERIA:
            if criterion == "reconstruction" and not self._enumerable:
                continue
            weights = self._weights if criterion == "weight" else None
            values = rate_experts(criterion, self._numbers, layers=sums.layers, weights=weights, seed=seed)
            for share in shares:
                budget = Budget(keep=1 - share)
                yield criterion, share, choose_kept(criterion, values, sums.layers, budget, self.model.config)

    @cached_property
    def _weights(self) -> tuple[Tensor, ...]:
        return weight_saliency(self.model)

    @property
    def _numbers(self) -> list[int]:
        return layer_experts(self.model.config, self.model.registry)

    @property
    def _enumerable(self) -> bool:
        return max(self._numbers) <= MOST_ENUMERATED


def _newest(run: Path) -> StoredModel:
    checkpoints = Checkpointer(run / "checkpoints", keep=None)
    if not checkpoints.steps():
        raise ValueError(f"{run} holds no checkpoint: give the directory of a finished run")
    return open_model(checkpoints.path(checkpoints.steps()[-1]))
