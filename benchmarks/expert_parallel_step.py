"""One optimizer step of sigmoe on several processes, the batch shared out evenly: what one of them computes."""

from typing import Literal

import torch

from ..moe.model import Transformer
from ..parallel.config import ParallelConfig
from ..parallel.megatron import build_mesh
from ..parallel.parallelize import parallelize
from ..parallel.shards import Sharding
from ..parallel.zero import ZeroEngine
from .train_step import OPTIMIZER, Step, StepShape, engine_step


def sigmoe_step(shape: StepShape, stage: Literal[1, 2]) -> Step:
    """Return a step of sigmoe: all processes share out the experts, and ZeRO what is dense."""
    return engine_step(*build_zero(shape, ParallelConfig(ep=shape.ranks, zero_stage=stage)), shape)


def build_zero(shape: StepShape, parallel: ParallelConfig) -> tuple[Transformer, ZeroEngine]:
    """Return this process's part of the model and its engine."""
    registry, mesh = shape.model.build_registry(shape.domains), build_mesh(parallel)
    model = parallelize(shape.model, registry, mesh, parallel, seed=0, device=torch.device("cpu"))
    return model, ZeroEngine(model, mesh, OPTIMIZER, parallel, Sharding(shape.model, registry, mesh))
