"""Which implementation computes an operation, and how an operation with two of them is laid out.

The public function in `op.py` takes `backend`. "torch" is an autograd function beside it. "triton" is an operator of
torch's in `triton.py`, which alone imports Triton and is imported only where that backend is chosen:

- `torch.library.custom_op` for the forward and another for the backward, new tensors out, no argument changed; their
  bodies launch the kernels. So torch.compile sees one opaque node each and never looks into a launch;
- `register_fake` on both, for shapes and dtypes alone; `register_autograd` on the forward, to call the other;
- tensors on a CPU are for Triton's interpreter: the same kernels in small blocks, one configuration;
- `compile_cases()` names the kernels in the configurations that are shipped (`compile_case.py`).

Nothing here is global: `launch/` resolves the user's word once, the model is built with the answer and hands it on.
"""

from dataclasses import dataclass, fields
from typing import Literal

Backend = Literal["torch", "triton"]

# Operations whose Triton tests have passed on a GPU on record (`benchmarks/results/`, with hardware and commit).
VERIFIED: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Backends:
    """The backend of every operation that has two."""

    gate: Backend = "torch"
    positions: Backend = "torch"
    permute: Backend = "torch"
    expert_mlp: Backend = "torch"
    attention: Backend = "torch"
    rope: Backend = "torch"
    norm: Backend = "torch"
    swiglu: Backend = "torch"
    linear_cross_entropy: Backend = "torch"


TORCH = Backends()


def resolve(kernels: Literal["auto", "torch", "triton"], device: str) -> Backends:
    """Return the backends that `kernels` means on a `device` (cpu, cuda).

    auto: Triton on a GPU, for the operations that are verified there; torch for the others.
    """
    if kernels == "torch" or (kernels == "auto" and device != "cuda"):
        return TORCH
    chosen = [field.name for field in fields(Backends) if kernels == "triton" or field.name in VERIFIED]
    triton: Backend = "triton"
    return Backends(**dict.fromkeys(chosen, triton))
