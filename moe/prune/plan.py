"""What a pruned model is made of: pure bookkeeping over names, without a weight being read.

Of every sparse layer some experts are kept, renumbered without gaps, with their rows of the gate and of the selection
bias. All else stays.
"""

import dataclasses

from ..config import ModelConfig, layer_experts
from ..domains import DomainRegistry
from ..extract.plan import Origins, Submodel
from .budget import Kept
from .prunable import check_prunable


def plan_pruned(config: ModelConfig, registry: DomainRegistry, kept: Kept) -> Submodel:
    """Plan the model that keeps the experts `kept`, ascending ids by sparse layer.

    Every domain's sets become all experts that are left, the coefficient of the balance loss stays as it is. Raises
    ValueError for a model that cannot be pruned, ids that it has not, and fewer experts than its router chooses.
    """
    check_prunable(config, registry)
    _check_kept(config, registry, kept)
    counts = tuple(map(len, kept))
    sets = tuple(tuple(range(count)) for count in counts)
    domains = tuple(dataclasses.replace(domain, experts=sets) for domain in registry.domains)
    if config.router.name == "top_k":
        router = dataclasses.replace(config.router, num_experts=counts[0] if len(set(counts)) == 1 else counts)
    else:
        router = dataclasses.replace(config.router, sets={domain.name: sets for domain in domains})
    origins = Origins(
        config=config,
        ids=tuple(domain.id for domain in domains),
        kept=kept,
        slots=tuple(range(config.num_slots)),
    )
    return origins.submodel(dataclasses.replace(config, router=router), DomainRegistry(domains=domains))


def _check_kept(config: ModelConfig, registry: DomainRegistry, kept: Kept) -> None:
    sparse = config.sparse_layer_ids
    if len(kept) != len(sparse):
        raise ValueError(f"kept experts are listed for {len(kept)} layers, but there are {len(sparse)} sparse ones")
    for layer, ids, number in zip(sparse, kept, layer_experts(config, registry)):
        if list(ids) != sorted(set(ids)) or not ids or not 0 <= ids[0] <= ids[-1] < number:
            raise ValueError(f"layer {layer}: kept ids must ascend from 0 to {number - 1} at the most, got {list(ids)}")
        if len(ids) < config.router.top_k:
            raise ValueError(
                f"layer {layer} keeps {len(ids)} expert(s), but the router chooses {config.router.top_k}: keep more"
            )
