"""From a criterion to the experts that stay: what rates them, and what then chooses."""

from collections.abc import Sequence

from torch import Tensor

from ..config import ModelConfig
from .budget import Budget, Kept, ModelSizes, choose_experts, choose_subsets
from .criteria import random_saliency, saliency, subset_errors
from .sums import LayerSums


def rate_experts(
    criterion: str,
    experts: Sequence[int],
    *,
    layers: Sequence[LayerSums] | None = None,
    weights: tuple[Tensor, ...] | None = None,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Return each sparse layer's float64 `[E]`; `experts` are the layers' E.

    `layers` is needed by criteria of data, `weights`, which `weight_saliency` returns, by criterion=weight, `seed` by
    criterion=random. Raises ValueError for sums without what the criterion is made of.
    """
    if criterion == "random":
        return random_saliency(experts, seed)
    if criterion == "weight":
        assert weights is not None
        return weights
    assert layers is not None
    return saliency(layers, criterion)


def choose_kept(
    criterion: str,
    values: Sequence[Tensor],
    layers: Sequence[LayerSums] | None,
    budget: Budget,
    config: ModelConfig,
    sizes: ModelSizes | None = None,
) -> Kept:
    """Return the experts to keep: the most salient by `values`, or the best subset. Errors as `choose_experts` has."""
    if criterion == "reconstruction":
        assert layers is not None
        return choose_subsets([subset_errors(layer) for layer in layers], budget, config, sizes)
    return choose_experts(values, budget, config, sizes)
