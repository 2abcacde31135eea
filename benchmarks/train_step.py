"""One optimizer step of each contender on the same random batch: forward, backward, clipping at 1, fused AdamW.

Shape letters: B sequences, S positions.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..moe.batch import IGNORED
from ..moe.config import ModelConfig
from ..moe.initialize import initialize
from ..moe.model import Transformer
from ..moe.routing import TrainingPass
from ..parallel.engine import OptimizerConfig, TrainEngine
from ..parallel.local import LocalEngine

Step = Callable[[int], float]
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_norm=1.0)


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What one step computes."""

    model: ModelConfig
    batch: int  # sequences, of all processes together
    sequence_length: int  # tokens a sequence
    rank: int = 0  # of the processes that share the batch out
    ranks: int = 1
    domains: tuple[str, ...] = ("text",)  # in turn, a sequence each

    def tokens(self) -> torch.Tensor:
        """Return this process's even share of the batch, int64 [B, S]: random ids, the batch the same everywhere."""
        generator = torch.Generator().manual_seed(0)
        token_BS = torch.randint(self.model.vocab_size, (self.batch, self.sequence_length), generator=generator)
        return token_BS.chunk(self.ranks)[self.rank]

    def domain_ids(self) -> torch.Tensor:
        """Return the domains of this process's sequences, int64 [B]."""
        return (torch.arange(self.batch) % len(self.domains)).chunk(self.ranks)[self.rank]


def build_step(contender: str, shape: StepShape) -> Step:
    """Return a function from the step's number to its loss; `contender` is sigmoe or a Mixtral of transformers."""
    if contender == "sigmoe":
        return _sigmoe_step(shape)
    step: Step = importlib.import_module("..mixtral_step", __name__).mixtral_step(shape, contender)
    return step


def _sigmoe_step(shape: StepShape) -> Step:
    return engine_step(*build_local(shape), shape)


def build_local(shape: StepShape) -> tuple[Transformer, LocalEngine]:
    """Return the model and its engine, in one process."""
    model = Transformer(shape.model, shape.model.build_registry(shape.domains))
    initialize(model, 0)
    return model, LocalEngine(model, OPTIMIZER)


def engine_step(model: Transformer, engine: TrainEngine, shape: StepShape) -> Step:
    """Return a step of a model that `engine` owns."""
    loss_of = loss_function(model, shape)

    def step(number: int) -> float:
        loss = loss_of(number)
        engine.backward(loss)
        engine.step(OPTIMIZER.lr)
        return float(loss.detach())

    return step


def loss_function(model: Transformer, shape: StepShape) -> Callable[[int], torch.Tensor]:
    """Return a function from the step's number to this process's part of the batch's mean loss, balance included."""
    router, token_BS = shape.model.router, shape.tokens()
    label_BS = torch.nn.functional.pad(token_BS[:, 1:], (0, 1), value=IGNORED)
    start_BS, domain_B = torch.zeros_like(token_BS), shape.domain_ids()
    labels = shape.batch * (shape.sequence_length - 1)

    def loss_of(number: int) -> torch.Tensor:
        output = model(
            token_BS,
            start_BS=start_BS,
            domain_B=domain_B,
            label_BS=label_BS,
            training=TrainingPass(seed=0, step=number),
        )
        loss: torch.Tensor = output.loss_sum / labels
        share = 1 / (max(len(output.stats), 1) * shape.batch * shape.sequence_length)
        for stats in output.stats:
            loss = loss + share * (router.auxiliary_loss * stats.balance_sum + router.z_loss * stats.z_sum)
        return loss

    return loss_of
