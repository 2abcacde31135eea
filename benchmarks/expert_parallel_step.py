"""One optimizer step of sigmoe on several processes, the batch shared out evenly: what one of them computes."""

from typing import Literal

import torch

from ..parallel.config import ParallelConfig
from ..parallel.megatron import build_mesh
from ..parallel.parallelize import parallelize
from ..parallel.shards import Sharding
from ..parallel.zero import ZeroEngine
from .train_step import OPTIMIZER, Step, StepShape, engine_step


def sigmoe_step(shape: StepShape, stage: Literal[1, 2]) -> Step:
    """Return a step of sigmoe: all processes share out the experts, and ZeRO what is dense."""
    parallel = ParallelConfig(ep=shape.ranks, zero_stage=stage)
    registry, mesh = shape.model.build_registry(("text",)), build_mesh(parallel)
    model = parallelize(shape.model, registry, mesh, parallel, seed=0, device=torch.device("cpu"))
    engine = ZeroEngine(model, mesh, OPTIMIZER, parallel, Sharding(shape.model, registry, mesh))
    return engine_step(model, engine, shape)
