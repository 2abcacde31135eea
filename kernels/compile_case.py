"""A kernel in a configuration that is shipped: what it takes to compile it where there is no GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CompileCase:
    """One kernel, its arguments' types and its constants.

    `signature`: Triton's names of types by argument: `*fp32` a pointer (16-byte aligned), `i32` an integer, `i32:16`
    one that is a multiple of 16. `constants`: the rest of the arguments. `is_product`: it must use the tensor cores.
    `architectures`: the compute capabilities that it is for. `may_spill`: its spills are reported, and no fault.
    """

    name: str
    kernel: Any  # triton.JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    is_product: bool = False
    architectures: range = range(80, 1000)
    may_spill: bool = False
