"""Which layouts a model allows, and where each expert lives: pure arithmetic on configs.

Letters: H query heads, G key/value heads, F hidden width, V vocabulary.
"""

from collections.abc import Iterable

from ..moe.config import ModelConfig
from ..moe.domains import DomainRegistry
from .config import ParallelConfig


def place_experts(sets: Iterable[tuple[int, ...]], ep: int) -> tuple[tuple[int, ...], ...]:
    """Return the expert ids of each of `ep` ranks, ascending: those of one domain lie on as many ranks as can be.

    Rank = (position inside the domain + offset of the domain) mod ep. The offset is the number of experts that earlier
    domains brought, so that small sets do not all begin on rank 0; an expert of several domains takes its first one's.
    """
    rank_of: dict[int, int] = {}
    for experts in sets:
        offset = len(rank_of)
        for position, expert in enumerate(experts):
            rank_of.setdefault(expert, (position + offset) % ep)
    return tuple(tuple(sorted(e for e, rank in rank_of.items() if rank == wanted)) for wanted in range(ep))


def check_layout(
    model: ModelConfig,
    registry: DomainRegistry,
    parallel: ParallelConfig,
    *,
    world_size: int,
    global_batch: int,
    micro_batch: int,
) -> int:
    """Return the accumulation steps; raise ValueError that says which setting fails, and lists what would be valid.

    `global_batch` and `micro_batch` are in sequences; a data-parallel rank takes micro_batch of them at a time.
    """
    problems = [
        *_tensor_problems(model, parallel, world_size),
        *_expert_problems(model, registry, parallel, world_size),
    ]
    if problems:
        raise ValueError("; ".join(problems))
    dp = world_size // parallel.tp
    if micro_batch < 1 or global_batch % (dp * micro_batch):
        share = global_batch // dp if global_batch % dp == 0 else 0
        valid = [f"micro_batch {_listed(_divisors(share))}"] if share else []
        valid.append(f"global_batch a multiple of {dp * max(micro_batch, 1)}")
        raise ValueError(
            f"global_batch {global_batch} is not dp ({dp}) x micro_batch ({micro_batch}) x accumulation steps: "
            f"valid would be {' or '.join(valid)}"
        )
    return global_batch // (dp * micro_batch)


def _tensor_problems(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> Iterable[str]:
    widths = {"num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads}
    if len(model.sparse_layer_ids) < model.num_layers:
        widths["ffn_dim" if model.ffn_dim is not None else "expert_dim (of dense layers)"] = model.dense_dim
    valid = [tp for tp in _divisors(world_size) if all(width % tp == 0 for width in widths.values())]
    valid = [tp for tp in valid if (tp - 1) * -(-model.vocab_size // tp) < model.vocab_size]
    if parallel.tp not in valid:
        shapes = ", ".join(f"{name} {width}" for name, width in widths.items())
        yield (
            f"parallel.tp={parallel.tp} must divide the {world_size} process(es), {shapes}, and leave every rank a "
            f"part of vocab_size {model.vocab_size}: valid would be {_listed(valid)}"
        )


def _expert_problems(
    model: ModelConfig, registry: DomainRegistry, parallel: ParallelConfig, world_size: int
) -> Iterable[str]:
    if not model.sparse_layer_ids:
        if parallel.ep > 1:
            yield f"parallel.ep={parallel.ep}, but the model has no sparse layer: valid would be 1"
        return
    layers = [registry.sets(index) for index in range(len(model.sparse_layer_ids))]
    valid = [ep for ep in _divisors(world_size) if world_size % (ep * parallel.expert_tp) == 0]
    valid = [ep for ep in valid if all(all(place_experts(sets, ep)) for sets in layers)]
    if parallel.ep not in valid:
        fewest = min(len({expert for experts in sets for expert in experts}) for sets in layers)
        yield (
            f"parallel.ep={parallel.ep} with etp={parallel.expert_tp} must divide the {world_size} process(es) and "
            f"leave every rank an expert of each sparse layer (the smallest has {fewest}): "
            f"valid would be {_listed(valid)}"
        )
    if model.expert_dim % parallel.expert_tp:
        yield f"parallel.etp={parallel.expert_tp} does not divide expert_dim {model.expert_dim}: valid would be 1"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values)) if values else "none"
