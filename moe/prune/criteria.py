"""How much each expert matters: the criteria, as functions of the calibration sums or of the weights alone.

g is the gate's weight, f the expert's output, n_e the tokens routed to e; sums run over these tokens. The most
salient experts are kept.

random           a keyed draw                                     the baseline
frequency        n_e
gate             sum g
activation       mean |f|                                         MAN, arXiv:2606.15716
reap             mean g |f|                                       REAP, arXiv:2510.13999
gate_activation  sum g |f|
easy_ep          sum g |f| max(1 - cos(h before, h after), 0)     EASY-EP, arXiv:2504.06792
weight           rms(w) / mean |w|, without data                  AIMER, arXiv:2603.18492
reconstruction   |F - F_S|^2 of subsets S, tried one by one       NAEE, arXiv:2402.14800

An expert that no token chose has saliency 0 under all that are sums or means.

Shape letters: E experts.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..config import layer_experts
from ..keyed import keyed_uniform, seed_of
from ..stored import StoredModel
from ..workers import ALONE, Workers
from .sums import MOST_ENUMERATED, LayerSums

# Which need calibration text, and which not.
DATA_CRITERIA = ("frequency", "gate", "activation", "reap", "gate_activation", "easy_ep", "reconstruction")
CRITERIA = ("random", "weight", *DATA_CRITERIA)
_CHUNK = 1 << 20  # elements of a weight that are widened to float64 at a time


def saliency(layers: Sequence[LayerSums], criterion: str) -> tuple[Tensor, ...]:
    """Return each sparse layer's float64 `[E]` under a criterion that needs data.

    Under `reconstruction`, which rates subsets and not experts, it is the error of dropping the expert alone; kept are
    the subsets that `choose_subsets` finds. Raises ValueError for an unknown criterion, or sums without subset errors.
    """
    return tuple(_layer_saliency(layer, criterion) for layer in layers)


def _layer_saliency(layer: LayerSums, criterion: str) -> Tensor:
    match criterion:
        case "frequency":
            return layer.count_E.double()
        case "gate":
            return layer.gate_E
        case "activation":
            return layer.norm_E / layer.count_E.clamp(min=1)
        case "reap":
            return layer.gate_norm_E / layer.count_E.clamp(min=1)
        case "gate_activation":
            return layer.gate_norm_E
        case "easy_ep":
            return layer.easy_ep_E
        case "reconstruction":
            whole = (1 << layer.num_experts) - 1
            return subset_errors(layer)[[whole ^ (1 << expert) for expert in range(layer.num_experts)]]
    raise ValueError(f"criterion {criterion!r} is none of those that need data: {', '.join(DATA_CRITERIA)}")


def subset_errors(layer: LayerSums) -> Tensor:
    """Return a layer's errors, float64 `[2^E]`; ValueError where they were not collected, or cannot be."""
    if layer.subset_error is None:
        check_enumerable([layer.num_experts])
        raise ValueError("these sums hold no subset errors: calibrate again with criterion=reconstruction")
    return layer.subset_error


def check_enumerable(experts: Sequence[int]) -> None:
    """Raise ValueError where a layer has too many experts to try all subsets."""
    if max(experts) > MOST_ENUMERATED:
        raise ValueError(
            f"criterion=reconstruction tries every subset of a layer's experts, of which there may be {MOST_ENUMERATED}"
            f"; this model has {max(experts)}: choose another criterion"
        )


def random_saliency(experts: Sequence[int], seed: int) -> tuple[Tensor, ...]:
    """Return uniform float64 `[E]` for layers of so many experts, keyed by (seed, sparse layer, expert)."""
    return tuple(
        keyed_uniform(seed_of("saliency", seed, layer), torch.arange(number), 1).squeeze(1).double()
        for layer, number in enumerate(experts)
    )


def weight_saliency(
    model: StoredModel,
    workers: Workers = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, ...]:
    """Return each sparse layer's float64 `[E]` of rms(w) / mean |w| over an expert's three matrices together.

    At least 1; the inverse of AIMER's score, in which experts with evenly spread weights stand highest and are dropped.
    An expert of zeros has 0. One tensor is in memory at a time; each process rates its share of the layers. `progress`
    hears bytes read and in all, of this share.
    """
    names = [
        [
            [f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight" for matrix in ("w1", "w2", "w3")]
            for expert in range(number)
        ]
        for layer, number in zip(model.config.sparse_layer_ids, layer_experts(model.config, model.registry))
    ]
    share = names[workers.rank :: workers.size]
    total = sum(model.tensors.num_bytes(name) for layer in share for expert in layer for name in expert)
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        weight = model.tensors.read(name).flatten()
        done += weight.nbytes
        progress(done, total)
        return weight

    def rate(layer: Sequence[Sequence[str]]) -> list[float]:
        return [_spread_of(map(read, matrices)) for matrices in layer]

    return tuple(torch.tensor(values, dtype=torch.float64) for values in workers.spread(rate, names))


def _spread_of(weights: Iterable[Tensor]) -> float:
    """Return rms / mean of the magnitudes of all elements; 0 where all are zero."""
    absolute, squares, count = 0.0, 0.0, 0
    for weight in weights:
        for chunk in torch.split(weight, _CHUNK):
            wide = chunk.double()
            absolute, squares = absolute + float(wide.abs().sum()), squares + float(wide.square().sum())
        count += weight.numel()
    return (squares / count) ** 0.5 / (absolute / count) if absolute else 0.0
