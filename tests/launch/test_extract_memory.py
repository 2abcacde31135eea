"""`sigmoe extract` streams: its memory grows with the largest tensor, not with the model, nor with a layer."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from sigmoe.moe.canonical import expected_shapes
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.parsing import to_mapping
from sigmoe.moe.storage.checkpoint import CheckpointContent, write_checkpoint
from sigmoe.moe.storage.tensors import NamedTensor
from sigmoe.moe.stored import open_model

# ru_maxrss would begin at what the parent process held when it forked.
PROGRAM = """
import sys
from pathlib import Path
from sigmoe.launch.main import main
code = main(sys.argv[1:])
print([line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")][0].split()[1])
sys.exit(code)
"""
SLACK = 48 << 20  # buffers, two batches of logits, hidden states
MODELS = {"small": {"dim": 8, "expert_dim": 8}, "large": {"dim": 512, "expert_dim": 2048}}


def write_model(path, dataset, dim, expert_dim):
    """A checkpoint of two sparse layers with eight experts for each of two domains; weights of one random tensor."""
    config = ModelConfig(
        vocab_size=4096,
        dim=dim,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        expert_dim=expert_dim,
        router=RouterConfig(name="domain_top_k", sets=8),
    )
    registry = config.build_registry(("recipes", "ships"))
    random = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).mul_(0.05)

    def tensor(number, shape):
        return lambda: random.roll(number).repeat(-(-shape.numel() // len(random)))[: shape.numel()].view(shape)

    shapes = {name: torch.Size(shape) for name, shape in expected_shapes(config, registry).items()}
    content = CheckpointContent(
        model={name: NamedTensor(s, torch.float32, tensor(i, s)) for i, (name, s) in enumerate(shapes.items())},
        optimizer={},
        state={"step": 1},
        config={"model": to_mapping(config), "sequence_length": 32},
        registry=registry.to_json(),
        tokenizer=open_dataset(dataset).tokenizer_path.read_bytes(),
        hf_config=None,
    )
    write_checkpoint(path, content)
    return open_model(path)


@pytest.fixture(scope="module")
def folder():
    """In memory where there is one: half a GB is not synced to a disk."""
    shm = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def models(dataset, folder):
    return {name: write_model(folder / name, dataset, **sizes) for name, sizes in MODELS.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("options", [["verify=0"], ["verify=300", "dtype=bf16"]], ids=" ".join)
def test_the_peak_is_bounded_by_the_largest_tensor(models, dataset, folder, options):
    peak = {}
    for name, model in models.items():
        out = folder / f"{name}-{'-'.join(options)}"
        keys = [f"checkpoint={model.path}", "domain=ships", f"dataset={dataset}", "threads=1", f"out='{out}'"]
        command = [sys.executable, "-c", PROGRAM, "extract", *keys, *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        peak[name] = 1024 * int(done.stdout.split()[-1])
    tensors = models["large"].tensors
    sizes = {name: tensors.num_bytes(name) for name in tensors.names()}
    grown, layer = peak["large"] - peak["small"], sum(n for name, n in sizes.items() if "layers.0." in name) // 2
    print(f"{grown / 1e6:.0f} MB above the baseline of {peak['small'] / 1e6:.0f} MB")
    assert grown <= 2 * max(sizes.values()) + SLACK < layer < sum(sizes.values()) / 3
