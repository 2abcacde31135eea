"""How many experts may stay, and which ones these are then.

Counts are by sparse layer. Ties go to the lower id, in `global` to the lower layer.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..canonical import expert_of
from ..config import ModelConfig
from ..parsing import parse_bytes
from ..stored import StoredModel

Kept = tuple[tuple[int, ...], ...]  # expert ids, ascending, by sparse layer


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Bytes of a model's tensors: what all share, and by sparse layer one expert with its gate row and bias."""

    shared: int
    expert: tuple[int, ...]

    def total(self, counts: Sequence[int]) -> int:
        """Return the bytes of the model with so many experts in each sparse layer."""
        return self.shared + sum(size * count for size, count in zip(self.expert, counts, strict=True))


def model_sizes(model: StoredModel) -> ModelSizes:
    """Return the sizes as stored, dtypes as they are; nothing is read."""
    sparse, tensors = model.config.sparse_layer_ids, model.tensors
    expert, shared = dict.fromkeys(sparse, 0), 0
    for name in tensors.names():
        layer, bytes = expert_of(name), tensors.num_bytes(name)
        gate = re.match(r"model\.layers\.(\d+)\.block_sparse_moe\.gate\.", name)
        if gate is not None:
            expert[int(gate[1])] += bytes // tensors.shape(name)[0]
        elif layer is None:
            shared += bytes
        elif layer[1] == 0:
            expert[layer[0]] += bytes
    return ModelSizes(shared=shared, expert=tuple(expert.values()))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One of four ways to say how many experts stay."""

    keep: float | None = None  # a fraction of each layer's experts, to the nearest whole number, halves up
    experts: int | tuple[int, ...] | None = None  # of each sparse layer, or one number a sparse layer
    total: int | float | None = None  # over all layers together: a number, or a fraction of all
    bytes: int | None = None  # the largest model not above it, with equally many in each layer

    def __post_init__(self) -> None:
        given = [name for name in ("keep", "experts", "total", "bytes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of keep=, experts=, global= and bytes=, got {len(given)} of them")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie above 0 and be at most 1, got {self.keep:g}")
        if isinstance(self.total, float) and not 0 < self.total <= 1:
            raise ValueError(f"global must be a fraction above 0 and at most 1, or a whole number, got {self.total:g}")

    @property
    def may_be_unequal(self) -> bool:
        """Whether layers of equally many experts may end with different numbers."""
        return self.total is not None or isinstance(self.experts, tuple)


def parse_budget(keys: Mapping[str, Any]) -> Budget:
    """Build a budget from the keys `keep`, `experts`, `global`, `bytes`, of which all but one are missing or None.

    `bytes` may have a unit: 2GB, 1.5GiB, 800 MB. Raises ValueError naming the key.
    """
    target = keys.get("bytes")
    return Budget(
        keep=keys.get("keep"),
        experts=keys.get("experts"),
        total=keys.get("global"),
        bytes=parse_bytes(target, "bytes") if isinstance(target, str) else target,
    )


def choose_experts(
    saliency: Sequence[Tensor], budget: Budget, config: ModelConfig, sizes: ModelSizes | None = None
) -> Kept:
    """Return the experts to keep: of each layer the most salient.

    Under `global` each layer keeps its top_k best, and the rest go where the saliency, divided by its layer's sum, is
    highest: raw saliencies of different layers have different scales. `sizes` is needed by `bytes` alone. Raises
    ValueError where the budget is no possible one.
    """
    numbers = [len(value_E) for value_E in saliency]
    for layer, value_E in enumerate(saliency):
        if not bool(value_E.isfinite().all()):
            raise ValueError(
                f"sparse layer {layer}: a saliency is not finite, outputs or weights overflow: try criterion=frequency"
            )
    ranked = [torch.sort(value_E, descending=True, stable=True).indices.tolist() for value_E in saliency]
    if budget.total is None:
        counts = _counts(budget, numbers, config.router.top_k, sizes)
    else:
        counts = _global_counts(saliency, ranked, _total(budget.total, numbers, config.router.top_k), config)
    return tuple(tuple(sorted(order[:count])) for order, count in zip(ranked, counts, strict=True))


def choose_subsets(
    errors: Sequence[Tensor], budget: Budget, config: ModelConfig, sizes: ModelSizes | None = None
) -> Kept:
    """Return for each layer the subset of the budget's size with the lowest error, float64 `[2^E]` by layer.

    Under `global` the sizes are those with the lowest sum of errors over all layers. Equal errors: the first subset in
    the order of its ids.
    """
    top_k = config.router.top_k
    numbers = [len(error).bit_length() - 1 for error in errors]
    best = [
        {size: _best_subset(error, number, size) for size in range(top_k, number + 1)}
        for error, number in zip(errors, numbers, strict=True)
    ]
    if budget.total is None:
        counts = _counts(budget, numbers, top_k, sizes)
    else:
        costs = [{size: cost for size, (cost, _) in layer.items()} for layer in best]
        counts = _cheapest_counts(costs, _total(budget.total, numbers, top_k))
    return tuple(layer[count][1] for layer, count in zip(best, counts, strict=True))


def _counts(budget: Budget, numbers: Sequence[int], top_k: int, sizes: ModelSizes | None) -> list[int]:
    """Return how many experts each layer keeps, where that does not depend on the saliency."""
    if budget.keep is not None:
        return [max(top_k, int(budget.keep * number + 0.5)) for number in numbers]
    if budget.experts is not None:
        counts = [budget.experts] * len(numbers) if isinstance(budget.experts, int) else list(budget.experts)
        if len(counts) != len(numbers):
            raise ValueError(f"experts lists {len(counts)} layers, but the model has {len(numbers)} sparse ones")
        for layer, (count, number) in enumerate(zip(counts, numbers)):
            if not top_k <= count <= number:
                raise ValueError(
                    f"experts: {count} in sparse layer {layer}, which has {number} and whose router chooses {top_k}: "
                    f"give a number from {top_k} to {number}"
                )
        return counts
    assert budget.bytes is not None and sizes is not None
    fitting = [
        counts
        for most in range(top_k, max(numbers) + 1)
        if sizes.total(counts := [min(most, number) for number in numbers]) <= budget.bytes
    ]
    if not fitting:
        least = sizes.total([min(top_k, number) for number in numbers])
        raise ValueError(f"bytes={budget.bytes}: with {top_k} experts a layer the model still has {least} bytes")
    return fitting[-1]


def _total(total: int | float, numbers: Sequence[int], top_k: int) -> int:
    count = total if isinstance(total, int) else max(top_k * len(numbers), int(total * sum(numbers) + 0.5))
    if not top_k * len(numbers) <= count <= sum(numbers):
        raise ValueError(
            f"global={total}: {len(numbers)} sparse layers whose routers choose {top_k} can keep from "
            f"{top_k * len(numbers)} to {sum(numbers)} experts"
        )
    return count


def _global_counts(
    saliency: Sequence[Tensor], ranked: Sequence[Sequence[int]], total: int, config: ModelConfig
) -> list[int]:
    top_k = config.router.top_k
    shares = [(value_E / value_E.sum().clamp(min=torch.finfo(torch.float64).tiny)).tolist() for value_E in saliency]
    rest = sorted((-shares[layer][e], layer, e) for layer, order in enumerate(ranked) for e in order[top_k:])
    counts = [top_k] * len(ranked)
    for _, layer, _ in rest[: total - sum(counts)]:
        counts[layer] += 1
    return counts


def _best_subset(error: Tensor, number: int, size: int) -> tuple[float, tuple[int, ...]]:
    subsets = list(itertools.combinations(range(number), size))
    costs = error[[sum(1 << expert for expert in subset) for subset in subsets]].tolist()
    best = min(range(len(subsets)), key=costs.__getitem__)
    return costs[best], subsets[best]


def _cheapest_counts(costs: Sequence[Mapping[int, float]], total: int) -> list[int]:
    """Return sizes that add up to `total` and whose costs have the lowest sum: exact, layer by layer."""
    reached: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer in costs:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (cost, counts) in reached.items():
            for size, more in layer.items():
                better = used + size not in longer or cost + more < longer[used + size][0]
                if used + size <= total and better:
                    longer[used + size] = (cost + more, (*counts, size))
        reached = longer
    return list(reached[total][1])
