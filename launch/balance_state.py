"""The load that steps leave behind: selections by domain and expert, fractions for the next step, selection bias.

Shape letters: B sequences, E experts, N domains.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..moe.balance import next_bias, next_fractions, uniform_fractions
from ..moe.config import num_experts
from ..moe.model import Transformer
from ..moe.routing import RoutingStats
from ..parallel.collectives import all_reduce
from ..parallel.mesh import Axis


class BalanceState:
    """Counts one optimizer step at a time, over micro-batches and the ranks of `dp`, which all know the sums."""

    def __init__(self, model: Transformer, dp: Axis) -> None:
        self.model, self.config, self.dp = model, model.config.router, dp
        layers = model.config.sparse_layer_ids
        registry = model.registry
        self.sets = {layer: registry.sets(i) for i, layer in enumerate(layers)}
        self.sizes = {layer: num_experts(registry, i) for i, layer in enumerate(layers)}
        self.fractions = {layer: uniform_fractions(self._groups(layer), self.sizes[layer]) for layer in layers}
        self.counts = self._zeros()

    def add(self, stats: Iterable[RoutingStats], domain_B: Tensor) -> None:
        """Count a micro-batch."""
        for layer_stats in stats:
            self.counts[layer_stats.layer].index_add_(0, domain_B.cpu(), layer_stats.count_BE.cpu())

    def finish_step(self, *, skipped: bool, trains: Callable[[str], bool]) -> dict[int, Tensor]:
        """Return the step's counts, int64 `[N, E]` by layer; move fractions and bias on unless it was skipped.

        `trains` tells by canonical name which biases may move, as it tells the engine which parameters may.
        """
        counts, self.counts = self.counts, self._zeros()
        for count_NE in counts.values():
            all_reduce(count_NE, self.dp)
        if skipped:
            return counts
        for layer, count_NE in counts.items():
            grouped_NE = count_NE.sum(0, keepdim=True) if self.config.name == "top_k" else count_NE
            self.fractions[layer] = next_fractions(self.fractions[layer], grouped_NE)
            name = f"model.layers.{layer}.block_sparse_moe.gate.e_score_correction_bias"
            if self.config.balance == "bias" and trains(name):
                bias_E = self.model.get_buffer(name)
                bias_E.copy_(next_bias(bias_E.cpu(), grouped_NE, self._groups(layer), self.config.bias_rate))
        return counts

    def to_json(self) -> dict[str, Any]:
        """Return the fractions as plain data; fp32 survives JSON exactly."""
        return {str(layer): fraction_NE.tolist() for layer, fraction_NE in self.fractions.items()}

    def load_json(self, data: Any) -> None:
        """Take over what `to_json` gave; ValueError where it does not fit."""
        for layer, fraction_NE in self.fractions.items():
            loaded = torch.tensor(data[str(layer)], dtype=torch.float32)
            if loaded.shape != fraction_NE.shape:
                raise ValueError(f"state.json: balance fractions of layer {layer} are {list(loaded.shape)}")
            self.fractions[layer] = loaded

    def _groups(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """Balance groups: the domains, or all experts at once under a global router."""
        return (tuple(range(self.sizes[layer])),) if self.config.name == "top_k" else self.sets[layer]

    def _zeros(self) -> dict[int, Tensor]:
        return {
            layer: torch.zeros(len(self.sets[layer]), size, dtype=torch.int64) for layer, size in self.sizes.items()
        }
