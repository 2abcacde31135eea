"""The machine that a figure was measured on: its name, its software, and how fast it multiplies matrices right now."""

import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.linear import product


def describe(packages: tuple[str, ...]) -> dict[str, str]:
    """Return CPU, cores, system, versions of Python and `packages`, and the source's commit."""
    described = {
        "CPU": f"{_cpu_model()}, {torch.get_num_threads()} threads",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    for package in packages:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = "not installed"
    return described | {"commit": _commit()}


def matmul_rates(device: torch.device, dtype: torch.dtype = torch.float32, *, seconds: float = 0.3) -> dict[str, float]:
    """Return the flops a second of square products (1024 on a CPU, 8192 on a GPU, random data), the best of several.

    `torch.mm` is torch's own choice of library, `product` sigmoe's (`kernels/linear/product.py`): the same on a GPU.
    """
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    kinds: dict[str, Callable[[], Tensor]] = {"torch.mm": lambda: torch.mm(a, b), "product": lambda: product(a, b)}
    return {name: 2 * side**3 / _best_time(multiply, device, seconds) for name, multiply in kinds.items()}


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, *, seconds: float = 0.3) -> float:
    """Return the best of `matmul_rates`: the peak that a training step is compared with."""
    return max(matmul_rates(device, dtype, seconds=seconds / 2).values())


def copy_rate(device: torch.device, *, seconds: float = 0.3) -> float:
    """Return the bytes a second, read and written, of a copy: 256 MB on a CPU, 4 GB on a GPU; the best of several."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_time(lambda: target.copy_(source), device, seconds)


def _best_time(multiply: Callable[[], Tensor], device: torch.device, seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        begin = time.perf_counter()
        multiply()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The checked-out commit of the source, with `+` after it if files differ from it."""
    root = Path(__file__).resolve().parent.parent
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")) != root:
            return "not a git checkout"
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
