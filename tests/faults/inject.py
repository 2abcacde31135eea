"""Faults of one rank of `sigmoe train`, injected into its process before it begins."""

import os
import signal
import time
from pathlib import Path

import torch

from sigmoe.launch import compose, preflight
from sigmoe.launch.session import Session
from sigmoe.launch.trainer import Trainer
from sigmoe.moe.data.loader import BatchLoader


def at_step(step, fault):
    """Call `fault` before a step."""
    train_step = Trainer.train_step

    def faulty(trainer):
        if trainer.step + 1 == step:
            fault()
        return train_step(trainer)

    Trainer.train_step = faulty


def while_loading(fault):
    """Call `fault` when the run has been resumed."""
    resume = Session.resume

    def faulty(session):
        resumed = resume(session)
        fault()
        return resumed

    Session.resume = faulty


def in_evaluation(step, fault):
    """Call `fault` in the evaluation after a step."""
    evaluate = Session._evaluate

    def faulty(session, metrics):
        if session.trainer.step == step:
            fault()
        return evaluate(session, metrics)

    Session._evaluate = faulty


def oversleep():
    """Miss the next collective operation."""
    time.sleep(1000)


def signalled(name):
    """Return what sends this process the signal."""
    return lambda: os.kill(os.getpid(), signal.Signals[name])


def spoil_gradients(first, last, value):
    """Multiply the gradients of steps `first` to `last` by `value`; their losses stay as they are."""
    objective = Trainer._objective

    def faulty(trainer, *arguments):
        loss = objective(trainer, *arguments)
        if first <= trainer.step + 1 <= last:
            loss.register_hook(lambda gradient: gradient * value)
        return loss

    Trainer._objective = faulty


def junk_data(first, last, global_batch):
    """Replace the tokens of the samples of steps `first` to `last` by random ones, the same on any rank."""
    batch = BatchLoader.batch

    def faulty(loader, samples):
        made = batch(loader, samples)
        for row, sample in enumerate(samples):
            if first <= sample // global_batch + 1 <= last:
                generator = torch.Generator().manual_seed(sample)
                made.token_BS[row] = torch.randint(0, 300, made.token_BS[row].shape, generator=generator)
                made.label_BS[row, :-1] = made.token_BS[row, 1:]
        return made

    BatchLoader.batch = faulty


def record_samples(name):
    """Append every sample that is taken to the file `name`."""
    batch = BatchLoader.batch

    def recorded(loader, samples):
        with Path(name).open("a") as file:
            file.writelines(f"{sample}\n" for sample in samples)
        return batch(loader, samples)

    BatchLoader.batch = recorded


def another_machine():
    """Have a folder of its own under the name of the run's, as on a machine without the others' disk."""
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    os.chdir(elsewhere)


def another_config():
    """Run with another value of a key than the rest."""
    composed = compose.compose_command

    def other(command, overrides, config_dir=None):
        return composed(command, [*overrides, "optim.weight_decay=0.5"], config_dir)

    compose.compose_command = other


def another_version():
    """Run with another version of a library than the rest."""
    preflight._version = lambda name: "0"
