"""Bytes that a process hands to the collectives of an optimizer step: arithmetic on config, layout and routed rows.

An all-reduce counts its tensor, an all-gather what comes out of it, an all-to-all what goes in. Tests hold every sum to
the bytes that torch.distributed was given, exactly.

Shape letters: T tokens, D model width, C head width, E experts, K top-k, P expert ranks, L the most experts of a rank.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..kernels.linear_cross_entropy import reduced_elements
from ..moe.config import ModelConfig
from ..moe.domains import DomainRegistry
from ..moe.precision import wide_dtype
from .config import ParallelConfig
from .costs import parameter_groups
from .mesh import Mesh
from .shards import Sharding

Traffic = Counter[tuple[str, str]]
"""Bytes by axis of the mesh and collective: all_reduce, all_gather or all_to_all."""

_INT64 = 8


class Rows(NamedTuple):
    """Rows that a process sends to the experts of a layer, and that its own experts receive."""

    sent: int
    received: int


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What a process's micro-batch sends depends on."""

    tokens: int
    heads: tuple[int, ...]  # tokens of each product with the head: one, or with embedding slots one a domain
    rows: Mapping[int, Rows]  # by sparse layer

    @classmethod
    def balanced(cls, config: ModelConfig, mesh: Mesh, tokens: int) -> "MicroBatch":
        """Return one in which nothing is dropped and all processes get what they send, as they do on average.

        Over the processes of a layer, sent and received rows are always T * K less what capacity drops, once for each
        process that holds a part of an expert.
        """
        rows = -(-tokens // (mesh.tp.size // mesh.etp.size)) * config.router.top_k
        even = dict.fromkeys(config.sparse_layer_ids, Rows(rows, rows))
        return cls(tokens=tokens, heads=(tokens,), rows=even)


def step_traffic(
    config: ModelConfig,
    registry: DomainRegistry,
    mesh: Mesh,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    micro_batches: Sequence[MicroBatch],
    *,
    device: str = "cpu",
    experts_outside: bool = False,
) -> Traffic:
    """Return what forwards, backwards and the engine's step send; axes of one process send nothing.

    `dtype` is that of parameters and activations.
    """
    total = _engine(config, registry, mesh, parallel, dtype, len(micro_batches), experts_outside)
    placement = Sharding(config, registry, mesh).placement
    for micro in micro_batches:
        sizes = _Sizes(config, mesh, parallel, dtype, micro)
        if mesh.tp.size > 1:
            total += _vocabulary(sizes, torch.empty(0, dtype=dtype, device=device))
            total += _attention(sizes)
            total += _dense(sizes)
        for layer, rows in micro.rows.items():
            total += _experts(sizes, max(map(len, placement[layer])), rows)
    return total


def _engine(
    config: ModelConfig,
    registry: DomainRegistry,
    mesh: Mesh,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    accumulation: int,
    experts_outside: bool,
) -> Traffic:
    """Gradients in fp32 (once a step under stage 1, after every backward under stage 2), parameters, norm.

    Experts outside ZeRO are summed once a step, and nothing of them is gathered.
    """
    total: Traffic = Counter()
    for group in parameter_groups(config, registry, mesh, dtype):
        if group.axis.size > 1:
            outside = experts_outside and group.axis_name == "edp"
            times = accumulation if parallel.zero_stage == 2 and not outside else 1
            total[group.axis_name, "all_reduce"] += times * group.size * wide_dtype(dtype).itemsize
            if not outside:
                total[group.axis_name, "all_gather"] += group.padded * group.dtype.itemsize
    if mesh.world.size > 1:
        total["world", "all_reduce"] += 2 * 8  # the norm's square and whether losses were finite, fp64
    return total


class _Sizes:
    """Bytes of a micro-batch's activations."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, parallel: ParallelConfig, dtype: torch.dtype, micro: MicroBatch
    ) -> None:
        self.config, self.mesh, self.micro = config, mesh, micro
        self.itemsize, self.wide = dtype.itemsize, wide_dtype(dtype).itemsize
        self.hidden = micro.tokens * config.dim * self.itemsize
        # What a backward computes again it also sends again, but for what no gradient needs: a block's last sum.
        self.block_again = parallel.recompute == "layer"
        self.attention_again = parallel.recompute in ("layer", "attention")
        self.weights = micro.tokens * config.router.top_k * self.wide if config.router.name != "rre" else 0


def _vocabulary(sizes: _Sizes, like: torch.Tensor) -> Traffic:
    """Embedding: the sum of looked-up rows. Head: its input's gradient, and what cross-entropy reduces."""
    columns = -(-sizes.config.vocab_size // sizes.mesh.tp.size)
    reduced = sum(reduced_elements(tokens, columns, like) for tokens in sizes.micro.heads)
    return Counter({("tp", "all_reduce"): 2 * sizes.hidden + reduced * sizes.wide})


def _attention(sizes: _Sizes) -> Traffic:
    """The output's sum and the input's gradient; QK-norm: sums of squares and their gradient, or its weight's."""
    layer = sizes.hidden * (2 + sizes.block_again)
    match sizes.config.qk_norm:
        case "head":
            layer += 2 * sizes.config.head_width * sizes.itemsize
        case "width":
            layer += 2 * sizes.micro.tokens * sizes.wide * (2 + sizes.attention_again)
    return Counter({("tp", "all_reduce"): sizes.config.num_layers * layer})


def _dense(sizes: _Sizes) -> Traffic:
    """The output's sum and the input's gradient."""
    layers = sizes.config.num_layers - len(sizes.config.sparse_layer_ids)
    return Counter({("tp", "all_reduce"): layers * 2 * sizes.hidden})


def _experts(sizes: _Sizes, most: int, rows: Rows) -> Traffic:
    """Rows out and back and their gradients, counts `[P, L]`; parts of an expert added up, or shared tokens gathered.

    `most` is L.
    """
    mesh, total = sizes.mesh, Counter[tuple[str, str]]()
    if mesh.tp.size > mesh.etp.size:
        padded = -(-sizes.micro.tokens // mesh.tp.size) * mesh.tp.size
        # The result, and the gradients of tokens and their weights.
        total["tp", "all_gather"] += (2 * sizes.hidden + sizes.weights) // sizes.micro.tokens * padded
    elif mesh.etp.size > 1:
        total["etp", "all_reduce"] += 2 * sizes.hidden + sizes.weights
    if mesh.ep.size > 1:
        row = sizes.config.dim * sizes.itemsize
        total["ep", "all_to_all"] += (rows.sent + rows.received) * row * (2 + sizes.block_again)
        total["ep", "all_to_all"] += mesh.ep.size * most * _INT64 * (1 + sizes.block_again)
    return total
