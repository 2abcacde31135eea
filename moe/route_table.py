"""Tables of the random routed experts (PanGu-Sigma, Ren et al. 2023): token id -> position inside the domain's set.

Shape letters: V vocabulary, E experts of a set.
"""

import heapq

import torch
from torch import Tensor

from .keyed import numpy_generator
from .model import Transformer
from .routers import RandomRoutedExperts


def build_route_row(count_V: Tensor, num_experts: int, seed: int, layer: int, domain: str) -> Tensor:
    """Return int32 `[V]`: a random assignment of token ids that balances their frequency.

    Frequent tokens first, their order shaken by the key, each to the expert with the least load so far; ties and
    unseen tokens fall by the key. List scheduling (Graham 1966): no expert exceeds the mean load by more than the
    most frequent token. A pure function of its arguments.
    """
    if count_V.min() < 0:
        raise ValueError("token counts must not be negative")
    random = numpy_generator("route_table", seed, layer, domain)
    counts = count_V.numpy().astype("float64")
    shaken = (counts + 1e-6) * random.uniform(0.5, 1.5, len(counts))
    heap = [(0.0, float(tie), expert) for expert, tie in enumerate(random.permutation(num_experts))]
    heapq.heapify(heap)
    row_V = torch.empty(len(counts), dtype=torch.int32)
    ties = random.uniform(size=len(counts)).tolist()
    tokens = (-shaken).argsort(kind="stable").tolist()
    for token, tie in zip(tokens, ties):
        load, _, expert = heap[0]
        row_V[token] = expert
        # An unseen token weighs a little, so that unseen tokens spread evenly as well.
        heapq.heapreplace(heap, (load + max(counts[token], 1e-6), tie, expert))
    return row_V


def fill_route_tables(model: Transformer, counts: dict[str, Tensor], seed: int) -> None:
    """Build every layer's table in place from each domain's token `counts` (int64 `[V]`); no-op for other routers."""
    for module in model.modules():
        if isinstance(module, RandomRoutedExperts):
            for row, name in enumerate(model.registry.names):
                size = len(module.sets[row])
                module.route_table[row] = build_route_row(counts[name], size, seed, module.layer, name)
