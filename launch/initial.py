"""`train initial=DIR`: a fresh run begins with the weights of a model instead of drawn ones."""

from collections.abc import Iterator

from ..moe.config import ModelConfig, layer_experts
from ..moe.domains import DomainRegistry
from ..moe.stored import StoredModel
from ..parallel.agreement import together
from .models import check_files, check_tokenizer, open_given_model
from .trainer import Trainer

_SHAPE = (
    "vocab_size dim num_layers num_heads num_kv_heads qk_norm rope_theta norm_eps sliding_window tie_embeddings".split()
)


def load_initial(trainer: Trainer, given: str) -> None:
    """Put the weights of the model `given`, selection biases and route tables too, into a run at step 0.

    The optimizer begins from zero. All ranks call it, and read no more than they hold. Raises ValueError in one line
    where it is another model than the run's, has another tokenizer, or is damaged.
    """
    world = trainer.mesh.world
    with together(world):
        stored = open_given_model(given)
        check_initial(given, stored, trainer.config.model, trainer.registry)
        check_tokenizer(given, stored, trainer.dataset)
        if world.rank == 0:
            check_files(stored)
    trainer.engine.load_named_state(stored.tensors, None)


def check_initial(given: str, stored: StoredModel, config: ModelConfig, registry: DomainRegistry) -> None:
    """Raise ValueError where a run's model has other tensors than `stored`, or computes something else from them."""
    theirs, ours = (dict(_facts(c, r)) for c, r in ((stored.config, stored.registry), (config, registry)))
    other = [f"{key}={_written(value)}" for key, value in theirs.items() if ours.get(key) != value]
    if other or theirs.keys() != ours.keys():
        missing = [f"no {key}" for key in ours if key not in theirs]
        raise ValueError(f"initial={given} is another model than this run's: it has {', '.join([*other, *missing])}")
    held, wanted = _parts(stored.config, stored.registry), _parts(config, registry)
    for name in [*wanted, *held]:
        if held.get(name) != wanted.get(name):
            raise ValueError(
                f"initial={given} and this run differ in the id, experts or embedding slot of domain {name!r}: its "
                f"domains are {', '.join(stored.registry.names)}, the dataset's {', '.join(registry.names)}"
            )


def _facts(config: ModelConfig, registry: DomainRegistry) -> Iterator[tuple[str, object]]:
    """Yield what decides tensors and arithmetic, by the key that sets it."""
    for name in _SHAPE:
        yield f"model.{name}", getattr(config, name)
    yield "model.head_dim", config.head_width
    sparse = config.sparse_layer_ids
    yield "model.sparse_layers", _spec(config)
    if len(sparse) < config.num_layers:
        yield "model.ffn_dim", config.dense_dim
    if not sparse:
        return
    router = config.router
    yield "model.expert_dim", config.expert_dim
    yield "router", router.name
    if router.name == "top_k":
        counts = layer_experts(config, registry)
        yield "router.num_experts", counts[0] if len(set(counts)) == 1 else counts
    if router.name != "rre":
        yield "router.top_k", router.top_k
        yield "router.renormalize", router.renormalize
        if router.balance == "bias":
            yield "router.balance", "bias"


def _spec(config: ModelConfig) -> str:
    """Return `sparse_layers`, the same text for the same layers."""
    sparse, every = config.sparse_layer_ids, tuple(range(config.num_layers))
    if not sparse or sparse == every:
        return "all" if sparse else "none"
    return f"upper:{len(sparse)}" if sparse == every[-len(sparse) :] else config.sparse_layers


def _parts(config: ModelConfig, registry: DomainRegistry) -> dict[str, object]:
    """What each domain has for itself, by name: nothing, where all share a gate and an embedding."""
    if not config.computes_by_domain:
        return {}
    return {d.name: (d.id, d.slot, d.experts if config.routes_by_domain else None) for d in registry.domains}


def _written(value: object) -> str:
    """Write a value as an override has it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
