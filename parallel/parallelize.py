"""A single-device model becomes a distributed one, from outside: the page that shows the order."""

from typing import NoReturn

import torch

from ..kernels.backend import TORCH, Backends
from ..moe.config import ModelConfig
from ..moe.domains import DomainRegistry
from ..moe.model import Transformer
from .config import ParallelConfig
from .expert_parallel import apply_expert_parallel
from .materialize import cut_parameters, materialize
from .mesh import Mesh
from .recompute import apply_recompute
from .shards import Sharding
from .tensor_parallel import apply_tensor_parallel


def parallelize(
    config: ModelConfig,
    registry: DomainRegistry,
    mesh: Mesh,
    parallel: ParallelConfig,
    *,
    seed: int,
    device: torch.device,
    backends: Backends = TORCH,
) -> Transformer:
    """Return this process's part of the model, its initial weights drawn; an engine takes it from here.

    The layout was checked by `check_layout`. Route tables are still zeros: `fill_route_tables` fills them.

    After a backward the gradients of what all of tp hold are complete and equal there. Data-parallel sums are the
    engine's: over dp for dense parameters, over edp for experts, sums and no means where the loss was divided by the
    labels of the global batch.
    """
    with torch.device("meta"):
        model = Transformer(config, registry, backends)
    sharding = Sharding(config, registry, mesh)
    cut_parameters(model, sharding)
    apply_tensor_parallel(model, mesh)
    apply_expert_parallel(model, mesh, sharding)
    apply_recompute(model, parallel.recompute)
    materialize(model, sharding, seed=seed, device=device)
    if mesh.tp.size > 1 or mesh.ep.size > 1:
        model.extend = _refuse_generation  # type: ignore[method-assign]
    return model


def _refuse_generation(*args: object, **kwargs: object) -> NoReturn:
    raise ValueError("a model that is spread over processes does not generate: save it, and generate in one process")
