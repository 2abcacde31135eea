"""Which models have experts that a saliency can choose among."""

from ..config import ModelConfig
from ..domains import DomainRegistry


def check_prunable(config: ModelConfig, registry: DomainRegistry) -> None:
    """Raise ValueError unless every sparse layer has one learned gate over all its experts."""
    if not config.sparse_layer_ids:
        raise ValueError("it has no sparse layer: there are no experts to prune")
    if config.router.name == "rre":
        raise ValueError("its router is rre, a fixed table without a learned gate: extract a domain instead")
    if config.router.name == "domain_top_k" and len(registry.domains) > 1:
        raise ValueError(
            f"its router is domain_top_k with {len(registry.domains)} domains, a gate each: extract one domain first"
        )
