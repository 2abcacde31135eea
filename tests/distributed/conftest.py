"""Starts each gloo world once, for all its cases, and runs the same cases in this process."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from cases import NAMES, SEQUENCES, batch, cases, finish, perturb, step

from sigmoe.moe.batch import IGNORED
from sigmoe.moe.canonical import canonical_tensors, canonical_views
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.moe.routers import LearnedGate

WHICH = "all" if os.environ.get("SIGMOE_PARITY") == "all" else "some"  # `make parity` wants them all
LIMIT = 1500 if WHICH == "all" else 280  # seconds for a world


@pytest.fixture(scope="session")
def run_world(tmp_path_factory):
    """Run all cases of a world size on that many processes; returns the folder of their results."""
    pytest.importorskip("megatron.core")

    @cache
    def run(world):
        folder = tmp_path_factory.mktemp(f"world{world}")
        program = Path(__file__).with_name("world.py")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ranks = []
        for rank in range(world):
            command = [sys.executable, str(program), str(rank), str(world), str(folder), WHICH]
            with (folder / f"words{rank}").open("w") as words:
                ranks.append(subprocess.Popen(command, stdout=words, stderr=words, env=environment))
        try:
            codes = [rank.wait(timeout=LIMIT) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        words = "\n".join((folder / f"words{rank}").read_text()[-3000:] for rank in range(world))
        assert codes == [0] * world, words
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


def watch_margins(model):
    """Let every gate note the least distance between the last expert chosen and the first that is not."""
    margins = [float("inf")]
    for module in model.modules():
        if isinstance(module, LearnedGate):
            module.choose = _Watch(module, margins)
    return margins


class _Watch:
    def __init__(self, gate, margins):
        self.gate, self.choose, self.margins = gate, gate.choose, margins

    def __call__(self, x_BSD, experts):
        logits, bias = self.gate._logits(x_BSD.detach(), experts)
        logits = logits.detach()
        score = logits.softmax(-1) + (0 if bias is None else bias)
        ordered, last = score.sort(-1, descending=True).values, self.gate.config.top_k
        if last < ordered.shape[-1]:
            self.margins[0] = min(self.margins[0], float((ordered[..., last - 1] - ordered[..., last]).min()))
        return self.choose(x_BSD, experts)


@pytest.fixture(scope="session")
def single():
    """Run a case in this process, once a model."""
    known = {}

    def run(case):
        if case.model_key not in known:
            known[case.model_key] = Single(case)
        return known[case.model_key]

    return run
