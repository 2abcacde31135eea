"""Memory on a CPU as torch's allocator counts it: exact, and the same in every run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..kernels.linear_cross_entropy import chunk_size
from ..moe.config import ModelConfig
from ..moe.initialize import initialize
from ..moe.model import Transformer
from ..moe.routing import TrainingPass
from .passes import kept_bytes


def allocated_peak(work: Callable[[], object]) -> int:
    """Return the most bytes that `work` held at a time, beside what was held before.

    Every allocation counts, those inside torch's operators too; not what libraries take past torch (oneDNN's own).
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda change: change.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of a training step beside its weights."""

    peak: int
    kept: int  # what the model's forward keeps for its backward, each allocation once
    head_gradients: int  # of the head's weight and input, which exist when the forward ends
    chunk: int  # of logits

    @property
    def formula(self) -> int:
        """What there must be when the head's gradients are made."""
        return self.kept + self.head_gradients + self.chunk

    def __str__(self) -> str:
        parts = self.peak, self.kept, self.chunk, self.head_gradients, self.peak / self.formula
        return "{:,} bytes at most; {:,} kept + {:,} a chunk of logits + {:,} head's gradients: {:.3f}x".format(*parts)


def step_memory(config: ModelConfig, sequence_length: int) -> StepMemory:
    """Measure forward and backward of one sequence of random tokens in fp32, on a CPU."""
    model = Transformer(config, config.build_registry(("text",)))
    initialize(model, 0)
    generator = torch.Generator().manual_seed(0)
    token_BS, label_BS = torch.randint(config.vocab_size, (2, 1, sequence_length), generator=generator).unbind()

    def loss() -> Tensor:
        loss_sum: Tensor = model(token_BS, label_BS=label_BS, training=TrainingPass(seed=0, step=0)).loss_sum
        return loss_sum / sequence_length

    kept = kept_bytes(loss, [*model.parameters(), token_BS])
    tokens = min(chunk_size(config.vocab_size, config.dim, token_BS.device), sequence_length)
    return StepMemory(
        peak=allocated_peak(lambda: loss().backward()),  # type: ignore[no-untyped-call]
        kept=kept,
        head_gradients=4 * (config.vocab_size + sequence_length) * config.dim,
        chunk=4 * tokens * config.vocab_size,
    )
