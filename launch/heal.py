"""Healing: a few steps of training of a pruned model's gates and experts on the calibration text, before it is written.

The model learns to predict the text as it is (cross-entropy, not the parent's distribution), routing as when it is
used: without capacity, jitter or balance losses. Everything but gates and experts stands.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..moe.canonical import canonical_tensors
from ..moe.counts import count_parameters
from ..moe.extract import Submodel
from ..moe.extract.unwritten import UnwrittenModel
from ..moe.model import Transformer
from ..moe.prune.text import CalibrationText
from ..parallel.engine import OptimizerConfig
from ..parallel.local import LocalEngine
from .memory import host_memory
from .schedule import ScheduleConfig, rate_ratio

_SPARSE = ".block_sparse_moe."


@dataclass(frozen=True, kw_only=True)
class Healed:
    """What training made of gates and experts (fp32, by canonical name), and each step's loss, nats a token.

    The steps took so many `batches` in turn, over and over.
    """

    tensors: Mapping[str, Tensor]
    losses: tuple[float, ...]
    batches: int


def check_host_memory(pruned: Submodel) -> None:
    """Raise ValueError where weights, gradients and two moments, in fp32, are more than this machine has."""
    needed = 16 * count_parameters(pruned.config, pruned.registry).total
    memory = host_memory()
    if needed > memory:
        raise ValueError(
            f"heal trains the whole model: that takes {needed / 1e9:,.1f} GB, this machine has {memory / 1e9:,.1f}: "
            "leave heal out, or keep fewer experts"
        )


def heal(
    model: UnwrittenModel,
    text: CalibrationText,
    *,
    steps: int,
    lr: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Healed:
    """Train for `steps` steps, one batch of `text` each, over and over in its order; the same bits at each call.

    AdamW without decay, clipped at norm 1; the rate rises over a tenth of the steps and falls to a tenth of `lr`. A
    short batch counts for what it holds. Raises ValueError where a step's loss or gradient is not finite.
    """
    trained = _load(model)
    engine = LocalEngine(trained, OptimizerConfig(lr=lr, weight_decay=0.0))
    engine.train_only(_heals)
    schedule = ScheduleConfig(warmup_steps=max(1, steps // 10))
    full, losses = text.batch(0).num_labels, []
    for step in range(steps):
        batch = text.batch(step % len(text))
        output = trained(
            batch.token_BS, start_BS=batch.start_BS, domain_B=batch.domain_B, label_BS=batch.label_BS, training=None
        )
        engine.backward(output.loss_sum / max(full, 1))
        if engine.step(lr * rate_ratio(schedule, step, steps)).skipped:
            raise ValueError(f"healing: loss or gradient of step {step + 1} is not finite: give a lower heal_lr")
        losses.append(float(output.loss_sum.detach()) / max(batch.num_labels, 1))
        progress(step + 1, steps)
    tensors = {name: tensor.detach() for name, tensor in engine.masters.items() if _heals(name)}
    return Healed(tensors=tensors, losses=tuple(losses), batches=len(text))


def _heals(name: str) -> bool:
    return _SPARSE in name


def _load(model: UnwrittenModel) -> Transformer:
    """Read the whole model in fp32; gradients are taken of what heals alone."""
    with torch.device("meta"):
        made = Transformer(model.config, model.registry)
    made = made.to_empty(device="cpu")
    for name, tensor in canonical_tensors(made).items():
        model.tensors.read_into(name, tensor.detach())
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(_heals(name))
    return made
