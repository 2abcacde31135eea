"""`kernels=`: which implementation a training run computes with."""

import dataclasses
import json

import pytest
import torch
import yaml

from sigmoe.kernels.backend import TORCH, Backends
from sigmoe.launch import kernel_choice
from sigmoe.launch.kernel_choice import backends_note, choose_backends
from sigmoe.launch.train_config import TrainConfig
from sigmoe.moe.storage.checkpoint import open_checkpoint

MODELS = {
    "top_k": [
        "model.qk_norm=head",
        "router=top_k",
        "router.num_experts=3",
        "router.capacity_factor=0.8",
        "router.balance=bias",
        "~router.sets",
    ],
    "domain_top_k": ["router=domain_top_k"],
    "rre_over_dense": [
        "router=rre",
        "model.num_layers=2",
        "model.sparse_layers=upper:1",
        "model.qk_norm=width",
        "model.sliding_window=3",
    ],
}
SMALL = ["steps=2", "global_batch=2", "sequence_length=5", "evaluate.tokens=5", "model.num_layers=1"]


def ran(folder):
    """Losses, norms, balance losses and drops of every step, and the weights after the last."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "grad_norm" in row]
    reader = open_checkpoint(folder / "checkpoints" / "step-00000002").model
    figures = [[row[key] for key in ("loss", "grad_norm", "aux_loss", "z_loss", "dropped")] for row in steps]
    return torch.tensor(figures), {name: reader.read(name) for name in reader.names()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares the interpreter with torch on a CPU")
@pytest.mark.parametrize("model", MODELS)
def test_training_steps_equal_those_of_torch(train, tmp_path, model):
    pytest.importorskip("triton")
    for kernels in ("torch", "triton"):
        assert train(*SMALL, *MODELS[model], f"kernels={kernels}", f"out={kernels}") == 0
    (want, want_weights), (got, got_weights) = ran(tmp_path / "torch"), ran(tmp_path / "triton")
    assert len(want) == 2 and (model != "top_k" or want[:, -1].sum() > 0)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)
    assert got_weights.keys() == want_weights.keys()
    for name, weight in want_weights.items():
        # Adam divides by the root of the second moment: where gradients are near zero their rounding grows.
        difference = (got_weights[name] - weight).double().norm()
        assert difference <= 2e-5 * weight.double().norm(), name


def test_a_resumed_run_may_change_it(train, tmp_path):
    assert train(*SMALL, "out=run", "stop_at=1", "kernels=torch") == 0
    assert train(*SMALL, "out=run", "kernels=auto") == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["kernels"] == "auto"


def test_what_cannot_run_is_one_line(train, tmp_path, capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for overrides, message in {
        "kernels=cuda": "kernels must be one of auto, torch, triton, got 'cuda'",
        "kernels=triton precision=fp64": "precision=fp64 takes kernels=torch",
        "kernels=triton model.expert_dim=24": "model.expert_dim=24: kernels=triton takes multiples of 16",
        "kernels=triton model.head_dim=272": "model.head_dim=272: kernels=triton takes up to 256",
        "kernels=triton router.sets=17 router.top_k=17": "router.top_k=17: kernels=triton takes up to 16",
        "kernels=triton router=top_k ~router.sets router.num_experts=4097": "router.num_experts=4097: kernels=triton",
        "kernels=triton precision=bf16 device=cpu": "interpreter computes right in fp32 alone",
    }.items():
        assert train(*overrides.split(), "out=run") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.delenv("TRITON_INTERPRET")
    assert train("kernels=triton", "device=cpu", "out=run") == 2
    error = capsys.readouterr().err
    assert "set TRITON_INTERPRET=1, or use kernels=torch" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_limits_are_those_of_the_kernels():
    pytest.importorskip("triton")
    from sigmoe.kernels.gate.triton import MOST_CHOICES, MOST_EXPERTS
    from sigmoe.kernels.norm.triton import MOST_WIDTH as MOST_DIM
    from sigmoe.kernels.rope.triton import MOST_NORM_WIDTH, MOST_WIDTH

    assert (kernel_choice.MOST_CHOICES, kernel_choice.MOST_EXPERTS) == (MOST_CHOICES, MOST_EXPERTS)
    assert (kernel_choice.MOST_DIM, kernel_choice.MOST_QK_NORM) == (MOST_DIM, MOST_NORM_WIDTH)
    assert kernel_choice.MOST_HEAD_WIDTH == MOST_WIDTH


def test_auto_is_torch_until_a_kernel_is_verified_on_a_gpu(train, tmp_path, monkeypatch):
    assert train(*SMALL, "out=run", "stop_at=1") == 0
    config = TrainConfig.load(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")

    def chosen(kernels, device):
        return choose_backends(kernels, config.model, "fp32", device)

    assert chosen("auto", gpu) == chosen("auto", cpu) == TORCH
    assert "no Triton kernel has been verified" in backends_note("auto", TORCH, gpu)
    assert backends_note("auto", TORCH, cpu) is None
    assert backends_note("torch", TORCH, gpu) is None
    every = chosen("triton", gpu)
    assert set(vars(every).values()) == {"triton"}
    assert backends_note("triton", every, cpu).endswith(
        "linear_cross_entropy; interpreted on this CPU, a step may take minutes"
    )
    monkeypatch.setattr("sigmoe.kernels.backend.VERIFIED", frozenset({"permute"}))
    assert chosen("auto", gpu) == Backends(permute="triton")
    assert backends_note("auto", chosen("auto", gpu), gpu) == "Triton kernels: permute"
    odd = dataclasses.replace(config.model, expert_dim=24)
    assert choose_backends("auto", odd, "fp32", gpu) == TORCH
    monkeypatch.setattr("sigmoe.launch.kernel_choice.VERIFIED", frozenset({"permute"}))
    assert "cannot compute this model" in backends_note("auto", TORCH, gpu)
    assert chosen("auto", cpu) == TORCH
