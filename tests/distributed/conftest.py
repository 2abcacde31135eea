"""Starts each gloo world once, for all its cases, and runs the same cases in this process."""

import json
import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from cases import NAMES, SEQUENCES, batch, cases, finish, perturb, step
from objective import watch_margins
from worlds import run_ranks

from sigmoe.moe.batch import IGNORED
from sigmoe.moe.canonical import canonical_tensors, canonical_views
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer

WHICH = "all" if os.environ.get("SIGMOE_PARITY") == "all" else "some"  # `make parity` wants them all
LIMIT = 1500 if WHICH == "all" else 280  # seconds for a world


@pytest.fixture(scope="session")
def run_world(tmp_path_factory):
    """Run all cases of a world size on that many processes; returns the folder of their results."""
    pytest.importorskip("megatron.core")

    @cache
    def started(world):
        folder = tmp_path_factory.mktemp(f"world{world}")
        return folder, run_ranks("world.py", world, folder, WHICH, seconds=LIMIT)

    def run(world):
        folder, wrong = started(world)
        assert wrong is None, wrong
        return folder

    return run


@pytest.fixture(scope="session")
def results(run_world):
    """Read what every rank of a case wrote: a list of (answer, tensors) by rank."""

    def read(case):
        folder, number = run_world(case.world), cases(case.world, WHICH == "all").index(case)
        return [
            (
                json.loads((folder / f"{number}-{rank}.json").read_text()),
                load_file(folder / f"{number}-{rank}.safetensors"),
            )
            for rank in range(case.world)
        ]

    return read


class Single:
    """A case's model, batch and step in one process."""

    def __init__(self, case):
        registry = case.config.build_registry(NAMES)
        model = Transformer(case.config, registry)
        initialize(model, 0)
        for name, tensor in canonical_tensors(model).items():
            if not name.endswith("route_table"):
                tensor.copy_(perturb(case.config, name, tensor))
        model = finish(case, model)
        self.model, self.batch = model, batch(case)
        self.values = {name: tensor.clone() for name, tensor in canonical_tensors(model).items()}
        self.margin = watch_margins(model)
        labels = int((self.batch.label_BS != IGNORED).sum())
        self.sums, self.counts = step(case, model, registry, [self.batch.rows(0, SEQUENCES)], labels)
        self.gradients = {}
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.gradients.update(canonical_views(name, gradient))


@pytest.fixture(scope="session")
def single():
    """Run a case in this process, once a model."""
    known = {}

    def run(case):
        if case.model_key not in known:
            known[case.model_key] = Single(case)
        return known[case.model_key]

    return run
