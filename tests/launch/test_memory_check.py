"""A run that does not fit into memory is refused at once, and told what would make it fit."""

import pytest

from sigmoe.launch import memory_check
from sigmoe.launch.compose import compose_command
from sigmoe.launch.memory_check import check_memory
from sigmoe.launch.train_config import TrainConfig
from sigmoe.moe.counts import count_parameters
from sigmoe.parallel.mesh import single_mesh

NAMES = ("recipes", "ships")


@pytest.fixture
def check(monkeypatch):
    """Check a tiny run in a memory of so many bytes a parameter."""

    def run(bytes_each, *overrides):
        words = ["dataset=none", "out=none", "model=tiny", "model.vocab_size=300", "device=cpu", *overrides]
        config = TrainConfig.load(compose_command("train", words))
        registry = config.model.build_registry(NAMES)
        memory = int(bytes_each * count_parameters(config.model, registry).total)
        monkeypatch.setattr(memory_check, "host_memory", lambda: memory)
        check_memory(config, registry, single_mesh(), 1)

    return run


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 4), ("bf16", 4), ("fp64", 8)])
def test_a_copy_for_saves_must_fit_beside_what_trains(check, precision, bytes_each):
    """Parameter, gradient and two moments; and again parameter and two moments."""
    words = f"precision={precision}"
    check(7 * bytes_each, words)
    with pytest.raises(
        ValueError, match=r"while a copy of its state is saved, there are .+: give save.background=false"
    ):
        check(6.9 * bytes_each, words)
    check(4 * bytes_each, words, "save.background=false")
    with pytest.raises(ValueError, match=r"to train, there are .+: make it smaller"):
        check(3.9 * bytes_each, words, "save.background=false")
