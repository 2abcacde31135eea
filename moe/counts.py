"""Parameters and floating-point operations of a model: the one formula behind every speed figure.

Shape letters: B sequences, S positions, D model width, F hidden width, V vocabulary, H query heads, G key/value heads,
C head width.
"""

from dataclasses import dataclass

from .config import ModelConfig, layer_experts, num_experts
from .domains import DomainRegistry


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Trained parameters: all of them, and those that one token of a domain passes through."""

    total: int
    active: int


def count_parameters(config: ModelConfig, registry: DomainRegistry) -> ParameterCount:
    """Count the trained parameters; active: one slot, and in a sparse layer K experts and the domains' mean gate."""
    d, expert = config.dim, 3 * config.dim * config.expert_dim
    shared = config.num_layers * (_attention(config) + 2 * d) + d
    shared += (config.num_layers - len(config.sparse_layer_ids)) * 3 * d * config.dense_dim
    slot = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    total, active = shared + config.num_slots * slot, shared + slot
    for index, experts in enumerate(layer_experts(config, registry)):
        total += experts * expert + (0 if config.router.name == "rre" else experts * d)
        active += config.router.top_k * expert + _gate(config, registry, index)
    return ParameterCount(total=total, active=active)


def train_flops(config: ModelConfig, registry: DomainRegistry, sequence_length: int) -> float:
    """Flops of one training step a token: 3 x forward (backward counts twice), recomputation not counted.

    Forward: 2 flops a weight of every product (head included, embedding look-up not), plus 4 H C flops a visible
    pair of attention, (S + 1) / 2 pairs a token for one causal document of `sequence_length` (window respected).
    """
    window = min(config.sliding_window or sequence_length, sequence_length)
    pairs = window * (window + 1) / 2 + (sequence_length - window) * window
    attention = 4 * config.num_heads * config.head_width * pairs / sequence_length
    products = config.num_layers * _projections(config) + config.vocab_size * config.dim
    products += (config.num_layers - len(config.sparse_layer_ids)) * 3 * config.dim * config.dense_dim
    for index in range(len(config.sparse_layer_ids)):
        products += config.router.top_k * 3 * config.dim * config.expert_dim + _gate(config, registry, index)
    return 3 * (2 * products + config.num_layers * attention)


def _gate(config: ModelConfig, registry: DomainRegistry, index: int) -> int:
    """Gate weights that a token passes through: its domain's rows, the mean over the domains."""
    sets = registry.sets(index)
    match config.router.name:
        case "top_k":
            return config.dim * num_experts(registry, index)
        case "domain_top_k":
            return config.dim * sum(len(experts) for experts in sets) // len(sets)
        case "rre":
            return 0


def _projections(config: ModelConfig) -> int:
    return config.dim * config.head_width * 2 * (config.num_heads + config.num_kv_heads)


def _attention(config: ModelConfig) -> int:
    c = config.head_width
    norms = {"none": 0, "head": 2 * c, "width": (config.num_heads + config.num_kv_heads) * c}
    return _projections(config) + norms[config.qk_norm]
