"""What a domain's submodel is made of: pure bookkeeping over names, without a weight being read.

Kept are the shared layers, and of every sparse layer the experts of the domains' sets, renumbered without gaps, the
gate's rows of these experts, the domains' rows of the route table, and the domains' embedding slots.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..canonical import expected_shapes, expert_of
from ..config import ModelConfig, layer_experts
from ..domains import Domain, DomainRegistry
from ..hf.names import dense_name

_GATE = re.compile(r"^model\.layers\.(\d+)\.block_sparse_moe\.gate\.(\w+)$")
_SLOT = re.compile(r"^(model\.embed_tokens|lm_head)\.(?:slots\.(\d+)\.)?weight$")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Where a tensor comes from: the parent's tensor, whole or some of its rows.

    With `shares`, tensors of the parent by name, `source` among them, each with its weight, it is their weighted mean.
    """

    source: str
    rows: tuple[int, ...] | None = None
    shares: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Submodel:
    """A model that is a part of another: its config, its registry, and the origin of each canonical tensor."""

    config: ModelConfig
    registry: DomainRegistry
    pieces: dict[str, Piece]

    @property
    def sources(self) -> frozenset[str]:
        """The tensors of the other model that are read, whole or in part."""
        pieces = self.pieces.values()
        return frozenset(name for piece in pieces for name in (piece.source, *(share for share, _ in piece.shares)))


def plan_submodel(config: ModelConfig, registry: DomainRegistry, names: Sequence[str]) -> Submodel:
    """Plan the submodel of the domains `names`; they keep their order and are numbered anew.

    A single domain whose sets hold one expert each, as wide as the dense layers (if there are any), becomes a dense
    model: its gate would weigh that expert with 1. Raises ValueError for an unknown domain, one named twice, or a
    learned gate over all experts, which no domain's experts can be told from where there are several.
    """
    if config.sparse_layer_ids and not config.routes_by_domain and len(registry.domains) > 1:
        raise ValueError(
            "its router is top_k, one gate over the experts of all domains: no domain can be cut out exactly (train "
            "with router=domain_top_k or router=rre for that)"
        )
    ids = sorted(registry.id_of(name) for name in names)
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"name each domain once, got {', '.join(names) or 'none'}")
    domains = [registry.domains[id] for id in ids]
    kept = [_union(domains, index) for index in range(len(config.sparse_layer_ids))]
    slots = sorted({domain.slot for domain in domains})
    sub_registry = DomainRegistry(
        domains=tuple(
            Domain(
                name=domain.name,
                id=position,
                slot=slots.index(domain.slot),
                experts=tuple(tuple(map(kept[i].index, experts)) for i, experts in enumerate(domain.experts)),
            )
            for position, domain in enumerate(domains)
        )
    )
    sub_config = _sub_config(config, sub_registry, len(slots))
    origins = Origins(config=config, ids=tuple(ids), kept=tuple(kept), slots=tuple(slots))
    return _dense(origins.submodel(sub_config, sub_registry))


@dataclass(frozen=True, kw_only=True)
class Origins:
    """What is kept of a model of `config`; the tensors of the submodel are numbered anew, in this order."""

    config: ModelConfig
    ids: tuple[int, ...]  # the domains'
    kept: tuple[tuple[int, ...], ...]  # experts of each sparse layer
    slots: tuple[int, ...]

    def submodel(self, config: ModelConfig, registry: DomainRegistry) -> Submodel:
        """Return the submodel of that config and registry, every tensor with its origin."""
        pieces = {name: self.of(name) for name in expected_shapes(config, registry)}
        return Submodel(config=config, registry=registry, pieces=pieces)

    def of(self, name: str) -> Piece:
        """Where the submodel's tensor `name` comes from."""
        expert, gate, slot = expert_of(name), _GATE.match(name), _SLOT.match(name)
        if expert is not None:
            old = self._kept(expert[0])[expert[1]]
            return Piece(source=name.replace(f".experts.{expert[1]}.", f".experts.{old}."))
        if gate is not None:
            return Piece(source=name, rows=self.ids if gate[2] == "route_table" else self._kept(int(gate[1])))
        if slot is not None and self.config.num_slots > 1:
            return Piece(source=f"{slot[1]}.slots.{self.slots[int(slot[2] or 0)]}.weight")
        return Piece(source=name)

    def _kept(self, layer: int) -> tuple[int, ...]:
        return self.kept[self.config.sparse_layer_ids.index(layer)]


def _union(domains: Sequence[Domain], index: int) -> tuple[int, ...]:
    return tuple(sorted({expert for domain in domains for expert in domain.experts[index]}))


def _sub_config(config: ModelConfig, registry: DomainRegistry, num_slots: int) -> ModelConfig:
    slots = {domain.name: domain.slot for domain in registry.domains} if num_slots > 1 else None
    sets = {domain.name: domain.experts for domain in registry.domains}
    router = config.router
    if config.sparse_layer_ids and router.sets is not None:
        router = dataclasses.replace(router, sets=sets)
    elif router.sets is not None:  # no layer reads it, but it must not name other domains
        router = dataclasses.replace(router, sets=1, top_k=1)
    return dataclasses.replace(config, embedding_slots=slots, router=router)


def _dense(submodel: Submodel) -> Submodel:
    """Return the same model without its gates, where these have nothing to choose from."""
    config, registry = submodel.config, submodel.registry
    alone = set(layer_experts(config, registry)) <= {1}
    all_sparse = len(config.sparse_layer_ids) == config.num_layers
    fits = all_sparse or config.dense_dim == config.expert_dim
    if not config.sparse_layer_ids or not alone or len(registry.domains) > 1 or not fits:
        return submodel
    domain = dataclasses.replace(registry.domains[0], experts=())
    router = config.router if config.router.sets is None else dataclasses.replace(config.router, sets=1)
    return Submodel(
        config=dataclasses.replace(config, sparse_layers="none", ffn_dim=None, router=router),
        registry=DomainRegistry(domains=(domain,)),
        pieces={dense_name(name): piece for name, piece in submodel.pieces.items() if not _GATE.match(name)},
    )
