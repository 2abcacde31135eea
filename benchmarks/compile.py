"""What the compiler makes of every Triton kernel, in the configurations that are shipped; no GPU is needed.

Registers and spills are those of the machine code, shared memory is Triton's figure; a product must use the tensor
cores.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..kernels.compile_case import CompileCase
from ..moe.data.progress import Progress, no_progress
from .machine import describe
from .table import BenchTable

# Folders of kernels/ with a triton.py.
KERNELS = (
    *("attention", "expert_mlp", "gate", "grouped", "linear_cross_entropy", "norm", "permute", "positions", "rope"),
    "swiglu",
)
_ALIGNED = [["tt.divisibility", 16]]
# Bytes that a program may ask for, by compute capability (CUDA's programming guide, technical specifications).
_MOST_SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}


@dataclass(frozen=True, kw_only=True)
class CompileSettings:
    """What `suite=compile` compiles for: compute capabilities, 80 (A100), 90 (H100)."""

    architectures: tuple[int, ...] = (80, 90)

    def __post_init__(self) -> None:
        if not self.architectures or min(self.architectures) < 80:
            raise ValueError(f"architectures must be one or more of 80 and above, got {list(self.architectures)}")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What came of one kernel.

    Spilled bytes are a thread's, shared ones a program's; `tensor_cores` counts instructions (wgmma on 90, else mma).
    """

    name: str
    architecture: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_cores: int
    is_product: bool
    may_spill: bool = False

    @property
    def fault(self) -> str | None:
        """Say what must not be shipped, if anything."""
        if self.spilled_bytes and not self.may_spill:
            return f"{self.name} spills {self.spilled_bytes} bytes on sm_{self.architecture}"
        if self.shared_bytes > _MOST_SHARED.get(self.architecture, self.shared_bytes):
            return f"{self.name} wants {self.shared_bytes} bytes of shared memory, more than sm_{self.architecture} has"
        if self.is_product and not self.tensor_cores:
            return f"{self.name} leaves the tensor cores of sm_{self.architecture} idle"
        return None


def run_suite(settings: CompileSettings, progress: Progress = no_progress) -> BenchTable:
    """Compile every kernel for every architecture; return the table.

    Raises ValueError where Triton is missing or interprets, OSError that names every spill and every product without
    tensor cores.
    """
    chosen = [(case, one) for case in shipped_cases() for one in settings.architectures if one in case.architectures]
    compiled: list[Compiled] = []
    progress("compiling", 0, len(chosen))
    for case, architecture in chosen:
        compiled.append(compile_case(case, architecture))
        progress("compiling", len(compiled), len(chosen))
    faults = [one.fault for one in compiled if one.fault is not None]
    if faults:
        raise OSError("; ".join(faults))
    return BenchTable(
        title="Triton kernels, compiled",
        columns=("kernel", "sm", "registers", "spilled B", "shared B", "tensor cores"),
        rows=tuple(_row(one) for one in compiled),
        notes=(
            "registers and spilled bytes of a thread, shared memory of a program; `tensor cores`: instructions, wgmma "
            "on sm_90, mma below",
            "nothing was run: these figures say that a kernel builds and does not spill, not how fast it is",
        ),
        machine=describe(("triton", "torch")),
        record={"kernels": [vars(one) for one in compiled]},
    )


def shipped_cases() -> Iterator[CompileCase]:
    """Yield every kernel in its shipped configurations; ValueError where Triton cannot compile here."""
    try:
        from triton import knobs
    except ImportError as error:
        raise ValueError("suite=compile needs Triton: pip install 'sigmoe[gpu]'") from error
    if knobs.runtime.interpret:
        raise ValueError("suite=compile needs Triton's compiler: unset TRITON_INTERPRET")
    for name in KERNELS:
        yield from importlib.import_module(f"sigmoe.kernels.{name}.triton").compile_cases()


def compile_case(case: CompileCase, architecture: int) -> Compiled:
    """Compile one kernel for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: kind.removesuffix(":16") for name, kind in case.signature.items()}
    signature = {name: types.get(name, "constexpr") for name in case.kernel.arg_names}
    assert types.keys() | case.constants.keys() == signature.keys(), f"{case.name}: arguments are missing"
    aligned = [name for name, kind in case.signature.items() if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(case.kernel.arg_names.index(name),): value for name, value in case.constants.items()},
        attrs={(case.kernel.arg_names.index(name),): _ALIGNED for name in aligned},
    )
    # Fused multiply-add is what a launch has by default; Triton 3.9 warns where that is not said.
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx: str = built.asm["ptx"]
    registers, spilled = _resources(built.asm["cubin"])
    return Compiled(
        name=case.name,
        architecture=architecture,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=built.metadata.shared,
        tensor_cores=len(re.findall(r"wgmma\.mma_async" if architecture == 90 else r"\bmma\.sync", ptx)),
        is_product=case.is_product,
        may_spill=case.may_spill,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers a thread and bytes of its stack, where alone spilled registers go in code without arrays."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(knobs.nvidia.cuobjdump.path), "--dump-resource-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if done.returncode or found is None:
        raise OSError(f"cuobjdump failed: {(done.stderr or done.stdout).strip()}")
    return int(found[1]), int(found[2])


def _row(one: Compiled) -> tuple[str, ...]:
    figures = (one.architecture, one.registers, one.spilled_bytes, one.shared_bytes)
    return (one.name, *(f"{figure:,}" for figure in figures), str(one.tensor_cores or ""))
