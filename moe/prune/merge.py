"""Merging: every dropped expert is averaged into the kept one that the router treats most alike.

Alike is the cosine of two experts' router probabilities over the calibration tokens; experts count by the tokens that
were routed to them (Li et al. 2023, "Merge, then compress", arXiv:2310.01334, section 3). The gate keeps the kept
experts' rows.

Shape letters: E experts.
"""

import dataclasses
from collections.abc import Sequence

import torch

from ..canonical import expert_of
from ..extract.plan import Piece, Submodel
from .budget import Kept
from .sums import LayerSums

Groups = tuple[tuple[tuple[int, ...], ...], ...]  # by sparse layer and kept expert: the experts that it is made of


def group_experts(layers: Sequence[LayerSums], kept: Kept) -> Groups:
    """Return for each kept expert the experts that it is made of, ascending, itself among them.

    A dropped expert goes to the kept one with the highest cosine, of equal ones to the lowest id.
    """
    return tuple(_layer_groups(layer, ids) for layer, ids in zip(layers, kept, strict=True))


def _layer_groups(layer: LayerSums, kept: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    length_E = layer.prob_EE.diagonal().sqrt()
    cosine_EE = layer.prob_EE / (length_E[:, None] * length_E).clamp(min=torch.finfo(torch.float64).tiny)
    members = {expert: [expert] for expert in kept}
    for expert in set(range(layer.num_experts)) - set(kept):
        row = cosine_EE[expert].tolist()
        members[max(kept, key=lambda other: (row[other], -other))].append(expert)
    return tuple(tuple(sorted(members[expert])) for expert in kept)


def plan_merged(pruned: Submodel, layers: Sequence[LayerSums], groups: Groups) -> Submodel:
    """Return the plan `pruned` with every kept expert the mean of its group, weighted by the tokens of each."""
    sparse = pruned.config.sparse_layer_ids
    pieces = {}
    for name, piece in pruned.pieces.items():
        place = expert_of(name)
        if place is not None:
            index = sparse.index(place[0])
            counts = [(expert, int(layers[index].count_E[expert])) for expert in groups[index][place[1]]]
            piece = _mean(piece, [(expert, count) for expert, count in counts if count])
        pieces[name] = piece
    return dataclasses.replace(pruned, pieces=pieces)


def _mean(piece: Piece, counts: Sequence[tuple[int, int]]) -> Piece:
    """Return `piece`, an expert's tensor, with those of other experts; one alone stays as it is."""
    own = expert_of(piece.source)
    assert own is not None
    if not counts or [expert for expert, _ in counts] == [own[1]]:
        return piece
    names = [(piece.source.replace(f".experts.{own[1]}.", f".experts.{expert}."), count) for expert, count in counts]
    return dataclasses.replace(piece, shares=tuple(names))
