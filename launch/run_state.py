"""A trainer's state to a checkpoint and back."""

from typing import Any

import torch

from ..moe.hf.config import hf_config
from ..moe.storage.checkpoint import Checkpoint, CheckpointContent
from .evaluation import DomainLoss, Losses
from .trainer import Trainer


def checkpoint_content(trainer: Trainer, before: Losses, after: Losses) -> CheckpointContent:
    """Return everything that a run needs to go on, tensors read lazily. All ranks call it."""
    config, dataset = trainer.config, trainer.dataset
    named = trainer.engine.named_state()
    state = {
        "step": trainer.step,
        "consumed_samples": trainer.step * config.global_batch,
        "dataset": dataset.digest,
        "phase": config.phase_at(max(trainer.step - 1, 0)),
        "skipped_steps": trainer.skipped,
        "guard": trainer.guard.to_json(),
        "balance_fractions": trainer.balance.to_json(),
        "expert_load": {str(layer): count.tolist() for layer, count in trainer.load_NE.items()},
        "heldout_before": {name: loss.to_json() for name, loss in before.items()},
        "heldout_after": {name: loss.to_json() for name, loss in after.items()},
    }
    return CheckpointContent(
        model=named.model,
        optimizer=named.optimizer,
        state=state,
        config=config.to_shared_dict(),
        registry=trainer.registry.to_json(),
        tokenizer=dataset.tokenizer_path.read_bytes(),
        hf_config=hf_config(
            config.model,
            trainer.registry,
            sequence_length=config.sequence_length,
            dtype="float64" if config.precision == "fp64" else "float32",
            end_of_text=dataset.end_of_text,
            padding=dataset.padding,
        ),
    )


def restore(trainer: Trainer, checkpoint: Checkpoint) -> tuple[Losses, Losses]:
    """Put `trainer` where `checkpoint` was saved; return the held-out losses before the first step and after the last.

    The latter are empty where the run had not ended.

    Raises ValueError where the checkpoint belongs to another model, registry, tokenizer or dataset.
    """
    if checkpoint.registry != trainer.registry.to_json():
        raise ValueError(
            f"{checkpoint.path}: its domains or expert sets are not those of this run's dataset and router"
        )
    if checkpoint.tokenizer != trainer.dataset.tokenizer_path.read_bytes():
        raise ValueError(f"{checkpoint.path}: its tokenizer is not the dataset's: give the dataset it was trained on")
    state: dict[str, Any] = checkpoint.state
    if state.get("dataset") != trainer.dataset.digest:
        raise ValueError(f"{checkpoint.path}: it was trained on other data than {trainer.dataset.path} holds now")
    trainer.engine.load_named_state(checkpoint.model, checkpoint.optimizer)
    try:
        trainer.step, trainer.skipped = int(state["step"]), int(state["skipped_steps"])
        if "guard" in state:  # checkpoints of 0.1 know no guard
            trainer.guard.load_json(state["guard"])
        trainer.balance.load_json(state["balance_fractions"])
        for layer, count in trainer.load_NE.items():
            count.copy_(torch.tensor(state["expert_load"][str(layer)]))
        before, after = (
            {name: DomainLoss.from_json(loss) for name, loss in state[key].items()}
            for key in ("heldout_before", "heldout_after")
        )
        return before, after
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint.path}/state.json lacks {error}") from error
