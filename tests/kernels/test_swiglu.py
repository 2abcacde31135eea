import math

import pytest
import torch

from sigmoe.kernels.swiglu import swiglu
from sigmoe.kernels.swiglu.reference import swiglu_reference


@pytest.mark.parametrize("shape", [(0, 6), (1, 2), (5, 14), (3, 2, 66)])
def test_matches_the_reference(assert_agrees, shape):
    assert_agrees(swiglu, swiglu_reference, [torch.randn(shape)])


def test_known_values():
    out = swiglu(torch.tensor([[0.0, 2.0, 5.0, 3.0]]))
    assert out.tolist()[0] == pytest.approx([0.0, 3 * 2 / (1 + math.exp(-2))], rel=1e-6)


def test_large_gates_neither_overflow_nor_vanish():
    gate_up = torch.tensor([[200.0, -200.0, 1.0, 1.0]], requires_grad=True)
    out = swiglu(gate_up)
    out.sum().backward()
    assert out.tolist() == [[200.0, 0.0]]
    assert gate_up.grad.tolist() == [[1.0, 0.0, 200.0, 0.0]]


def test_non_contiguous_input(assert_agrees):
    assert_agrees(lambda x: swiglu(x.t()), lambda x: swiglu_reference(x.t()), [torch.randn(6, 5)])


def test_bf16():
    x = torch.randn(3, 8).bfloat16().requires_grad_()
    out = swiglu(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert torch.allclose(out.float(), swiglu_reference(x.detach().float()), atol=2e-2, rtol=2e-2)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="even"):
        swiglu(torch.randn(2, 3))
