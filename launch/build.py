"""A run's model and engine: as they are in one process, or spread over several."""

import importlib
import warnings
from typing import Any

import torch

from ..kernels.backend import Backends
from ..moe.data.dataset import Dataset
from ..moe.domains import DomainRegistry
from ..moe.initialize import initialize
from ..moe.model import Transformer
from ..moe.precision import wide_dtype
from ..moe.route_table import fill_route_tables
from ..parallel.engine import TrainEngine
from ..parallel.layout import check_layout
from ..parallel.local import LocalEngine
from ..parallel.mesh import Axis, Mesh, single_mesh
from ..parallel.recompute import apply_recompute
from ..parallel.shards import Sharding
from .layout_costs import DTYPES
from .train_config import TrainConfig

_PARALLEL = "sigmoe.parallel"


def build_mesh(config: TrainConfig, registry: DomainRegistry, world: Axis) -> Mesh:
    """Make the groups of a layout that the model allows; else ValueError."""
    dp = max(world.size // config.parallel.tp, 1)
    check_layout(
        config.model,
        registry,
        config.parallel,
        world_size=world.size,
        global_batch=config.global_batch,
        micro_batch=config.micro_size(dp),
    )
    if world.size == 1:
        return single_mesh()
    mesh: Mesh = _module("megatron").build_mesh(config.parallel)
    return mesh


def build_model(
    config: TrainConfig,
    registry: DomainRegistry,
    dataset: Dataset,
    mesh: Mesh,
    device: torch.device,
    backends: Backends,
) -> Transformer:
    """Return this rank's part of the model, initial weights drawn, route tables filled from the dataset's counts."""
    model: Transformer
    if mesh.world.size == 1:
        with torch.device(device):
            model = Transformer(config.model, registry, backends)
        initialize(model, config.seed)
        apply_recompute(model, config.parallel.recompute)
    else:
        model = _module("parallelize").parallelize(
            config.model, registry, mesh, config.parallel, seed=config.seed, device=device, backends=backends
        )
    if config.model.router.name == "rre":
        counts = {name: dataset.token_counts(name) for name in dataset.domain_names}
        size = config.model.vocab_size
        padded = {name: torch.nn.functional.pad(count, (0, size - len(count))) for name, count in counts.items()}
        fill_route_tables(model, padded, config.seed)
    return model.to(wide_dtype(DTYPES[config.precision]))


def build_engine(config: TrainConfig, model: Transformer, mesh: Mesh) -> TrainEngine:
    """Return what owns the model's parameters from now on."""
    if mesh.world.size == 1:
        return LocalEngine(model, config.optim, DTYPES[config.precision])
    engine: TrainEngine = _module("zero").ZeroEngine(
        model,
        mesh,
        config.optim,
        config.parallel,
        Sharding(config.model, model.registry, mesh),
        dtype=DTYPES[config.precision],
        accumulation=config.global_batch // (mesh.dp.size * config.micro_size(mesh.dp.size)),
    )
    return engine


def _module(name: str) -> Any:
    """Import what brings DeepSpeed or Megatron-Core, which take seconds: only runs of several processes need them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Megatron-Core: Transformer Engine and Apex are not installed
        return importlib.import_module(f"{_PARALLEL}.{name}")
