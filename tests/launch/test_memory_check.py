"""A run that does not fit into memory is refused at once, and told what would make it fit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from sigmoe.launch import memory_check
from sigmoe.launch.compose import compose_command
from sigmoe.launch.layout_costs import rank_footprint
from sigmoe.launch.memory_check import check_memory
from sigmoe.launch.train_config import TrainConfig
from sigmoe.moe.counts import count_parameters
from sigmoe.parallel.mesh import Axis, single_mesh

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


def test_without_saves_in_mid_run_there_is_no_copy(check):
    check(4 * 4, "save.every=0")


def test_what_is_small_is_not_told_as_nothing(check):
    with pytest.raises(ValueError, match=r"needs at least 0\.00\d+ GB to train, there are 0\.00\d+ GB: make") as told:
        check(15.9)
    assert " 0 GB" not in str(told.value)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_ranks_of_a_machine_share_its_memory(monkeypatch, offload):
    """Two of them, by formula; with them on a GPU only what is offloaded and the copy lie in host memory."""
    words = ["dataset=none", "out=none", "model=tiny", "model.vocab_size=300", f"parallel.offload={offload}"]
    config = TrainConfig.load(compose_command("train", [*words, "device=cpu"]))
    registry, alone = config.model.build_registry(NAMES), single_mesh()
    two = Axis(group=None, rank=0, size=2)
    mesh = replace(alone, world=two, dp=two, edp=two)
    held = rank_footprint(config, registry, mesh)
    offloaded = held.optimizer if offload == "cpu" else 0
    gpu = SimpleNamespace(total_memory=held.total - offloaded)
    monkeypatch.setattr(memory_check.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(memory_check.torch.cuda, "get_device_properties", lambda device: gpu)
    for device, needed in (("cpu", held.total), ("cuda", offloaded)):
        monkeypatch.setattr(memory_check, "pick_device", lambda name, device=device: device)
        host = 2 * (needed + held.snapshot)
        monkeypatch.setattr(memory_check, "host_memory", lambda host=host: host)
        check_memory(config, registry, mesh, 2)
        monkeypatch.setattr(memory_check, "host_memory", lambda host=host: host - 1)
        with pytest.raises(ValueError, match=r"of host memory on this machine while a copy .* save.background=false"):
            check_memory(config, registry, mesh, 2)
    gpu.total_memory -= 1
    with pytest.raises(ValueError, match=r"on this machine to train, .*: make it smaller"):
        check_memory(config, registry, mesh, 2)


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
