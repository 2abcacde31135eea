"""`sigmoe bench suite=compile`: every kernel is built by the real compiler, in a process that does not interpret."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from sigmoe.benchmarks.compile import KERNELS, Compiled
from sigmoe.launch.main import main

ROOT = Path(__file__).parent.parent.parent
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

# A product, and a kernel that holds more than the registers of one warp.
KERNELS_OF_THE_TEST = """
import triton
import triton.language as tl
from sigmoe.benchmarks.compile import compile_case
from sigmoe.kernels.compile_case import CompileCase

@triton.jit
def multiply(a, b, out, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None] * N, tl.arange(0, N)[None, :]
    tl.store(out + row + column, tl.dot(tl.load(a + row + column), tl.load(b + row + column)))

@triton.jit
def hoard(a, out, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y, z = tl.load(a + at), tl.load(a + N + at), tl.load(a + 2 * N + at)
    largest = tl.max(x * y * z, 0)
    tl.store(out + at, x / largest)
    tl.store(out + N + at, y / largest)
    tl.store(out + 2 * N + at, z / largest)

pointers = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}
case = CompileCase(name="multiply", kernel=multiply, signature=pointers, constants={"N": 64}, is_product=True)
assert compile_case(case, 90).tensor_cores > 0 and compile_case(case, 80).tensor_cores > 0
assert compile_case(case, 90).fault is None
plain = {"a": "*fp32", "out": "*fp32"}
case = CompileCase(name="hoard", kernel=hoard, signature=plain, constants={"N": 4096}, num_warps=1, is_product=True)
built = compile_case(case, 90)
assert built.spilled_bytes > 0 and built.tensor_cores == 0, built
assert "spills" in built.fault
"""


def run_compiler(*arguments, timeout=200):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@NEEDS_TRITON
def test_every_kernel_compiles_without_spills(tmp_path):
    done = run_compiler("-m", "sigmoe.launch.bench", "suite=compile", f"out={tmp_path}/compiled")
    assert done.returncode == 0, done.stderr
    kernels = json.loads((tmp_path / "compiled.json").read_text())["kernels"]
    assert {one["architecture"] for one in kernels} == {80, 90}
    assert {one["spilled_bytes"] for one in kernels if not one["may_spill"]} == {0}
    assert all(one["registers"] > 0 for one in kernels)
    assert all(one["tensor_cores"] > 0 for one in kernels if one["is_product"])
    for folder in KERNELS:
        assert any(folder.split("_")[0] in one["name"] for one in kernels), folder


def test_every_folder_with_kernels_is_compiled():
    assert {path.parent.name for path in (ROOT / "kernels").glob("*/triton.py")} == set(KERNELS)


@NEEDS_TRITON
def test_spills_and_tensor_cores_are_seen(tmp_path):
    script = tmp_path / "kernels_of_the_test.py"
    script.write_text(KERNELS_OF_THE_TEST)
    done = run_compiler(str(script))
    assert done.returncode == 0, done.stderr


def test_faults_are_named():
    good = Compiled(
        name="k", architecture=90, registers=9, spilled_bytes=0, shared_bytes=0, tensor_cores=0, is_product=False
    )
    assert good.fault is None
    assert Compiled(**vars(good) | {"spilled_bytes": 8}).fault == "k spills 8 bytes on sm_90"
    assert Compiled(**vars(good) | {"spilled_bytes": 8, "may_spill": True}).fault is None
    most = Compiled(**vars(good) | {"shared_bytes": 232_448})
    assert most.fault is None
    assert Compiled(**vars(most) | {"shared_bytes": 232_449}).fault == (
        "k wants 232449 bytes of shared memory, more than sm_90 has"
    )
    assert "more than sm_80 has" in Compiled(**vars(most) | {"architecture": 80}).fault
    assert Compiled(**vars(good) | {"is_product": True}).fault == "k leaves the tensor cores of sm_90 idle"


def test_the_interpreter_cannot_compile(capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["bench", "suite=compile"]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
    assert main(["bench", "suite=compile", "compile.architectures=[70]"]) == 2
    assert "80 and above, got [70]" in capsys.readouterr().err
