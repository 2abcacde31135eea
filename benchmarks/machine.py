"""What machine a figure was measured on, and its matmul rate in the same run."""

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hardware and library versions behind a figure."""

    processor: str
    threads: int
    torch: str
    python: str


def describe_machine(device: torch.device) -> Machine:
    """Return what this process runs on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return Machine(
        processor=name, threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version()
    )


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, *, seconds: float = 0.3) -> float:
    """Return the flops a second of square products (1024 on a CPU, 8192 on a GPU, random data); the best of several.

    The best, because it stands for the peak that a training step is compared with.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    best, begin = 0.0, time.perf_counter()
    while time.perf_counter() - begin < seconds or best == 0.0:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} CPUs)" if names else platform.processor() or platform.machine()
