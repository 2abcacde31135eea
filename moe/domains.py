"""Which experts belong to which domain.

A registry only grows: a domain keeps its id, its slot and its expert ids for ever, because datasets and checkpoints
store them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .parsing import from_mapping

ExpertSets = Mapping[str, int | Sequence[int] | Sequence[Sequence[int]]]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A domain: its stable id, its embedding slot, and its set of expert ids in each sparse layer."""

    name: str
    id: int
    slot: int
    experts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class DomainRegistry:
    """Name -> stable id -> expert ids of each sparse layer. Sets may differ in size and may overlap."""

    domains: tuple[Domain, ...]

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("a domain registry needs at least one domain")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"domain names must differ, got {list(self.names)}")
        for position, domain in enumerate(self.domains):
            if domain.id != position:
                raise ValueError(f"domain {domain.name!r} has id {domain.id}, its position is {position}")
            for layer, experts in enumerate(domain.experts):
                _check_set(domain.name, layer, experts)

    @property
    def names(self) -> tuple[str, ...]:
        """The domains' names, in the order of their ids."""
        return tuple(domain.name for domain in self.domains)

    def id_of(self, name: str) -> int:
        """Return the id of domain `name`; raise ValueError that lists the known ones."""
        if name not in self.names:
            raise ValueError(f"unknown domain {name!r}; known domains: {', '.join(self.names)}")
        return self.names.index(name)

    def sets(self, sparse_index: int) -> tuple[tuple[int, ...], ...]:
        """Return each domain's expert ids in the `sparse_index`-th sparse layer."""
        return tuple(domain.experts[sparse_index] for domain in self.domains)

    def to_json(self) -> dict[str, object]:
        """Return the registry as plain JSON data."""
        return {
            "domains": [
                {"name": d.name, "id": d.id, "slot": d.slot, "experts": [list(experts) for experts in d.experts]}
                for d in self.domains
            ]
        }

    @staticmethod
    def from_json(data: object) -> "DomainRegistry":
        """Read what `to_json` wrote; raise ValueError where it has another form."""
        try:
            return from_mapping(DomainRegistry, data)
        except ValueError as error:
            raise ValueError(f"not a domain registry: {error}") from error


def build_registry(
    names: Sequence[str], sets: ExpertSets | int, num_sparse_layers: int, slots: Mapping[str, int] | None = None
) -> DomainRegistry:
    """Build the registry of `names`, in that order.

    `sets` is a number (every domain gets as many experts of its own) or names each domain's set: a number of experts
    of its own, the expert ids (which may overlap another domain's), or a list of ids for each sparse layer. Numbers
    are handed out in order, above every id that is named. `slots` gives a domain's embedding slot (default 0).
    """
    wanted: ExpertSets = dict.fromkeys(names, sets) if isinstance(sets, int) else sets
    for name in [*wanted, *(slots or {})]:
        if name not in names:
            raise ValueError(f"unknown domain {name!r}; known domains: {', '.join(names)}")
    missing = [name for name in names if name not in wanted]
    if missing:
        raise ValueError(f"no experts given for domain {missing[0]!r}: add it to router.sets")
    next_id = 1 + max((max(layer, default=-1) for name in names for layer in _named(wanted[name])), default=-1)
    domains = []
    for position, name in enumerate(names):
        given = wanted[name]
        if isinstance(given, int):
            layers = [tuple(range(next_id, next_id + given))] * num_sparse_layers
            next_id += given
        else:
            layers = [tuple(layer) for layer in _named(given)]
            layers = layers * num_sparse_layers if len(layers) == 1 else layers
        if len(layers) != num_sparse_layers:
            raise ValueError(f"domain {name!r} has expert sets for {len(layers)} of {num_sparse_layers} sparse layers")
        domains.append(Domain(name=name, id=position, slot=(slots or {}).get(name, 0), experts=tuple(layers)))
    return DomainRegistry(domains=tuple(domains))


def _named(given: int | Sequence[int] | Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return the expert ids that a set names, a list for each layer (or one for all)."""
    if isinstance(given, int):
        return []
    if given and not isinstance(given[0], int):
        return [list(layer) for layer in given]  # type: ignore[arg-type]
    return [list(given)]  # type: ignore[arg-type]


def _check_set(name: str, layer: int, experts: tuple[int, ...]) -> None:
    if not experts:
        raise ValueError(f"domain {name!r} has no experts in sparse layer {layer}: give it at least one")
    if list(experts) != sorted(set(experts)) or experts[0] < 0:
        raise ValueError(
            f"domain {name!r}, sparse layer {layer}: expert ids must ascend from 0 on, got {list(experts)}"
        )
