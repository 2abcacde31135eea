"""SwiGLU in plain maths, for the tests."""

import torch


def swiglu_reference(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` with gate the first half of the last dimension and up the second (arXiv:2002.05202)."""
    gate, up = gate_up_TG.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up
