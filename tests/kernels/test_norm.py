import math

import pytest
import torch

from sigmoe.kernels.norm import rms_norm
from sigmoe.kernels.norm.reference import rms_norm_reference


@pytest.mark.parametrize("shape", [(0, 5), (1, 3), (3, 7), (2, 5, 33), (2, 3, 4, 6)])
def test_matches_the_reference(assert_agrees, shape):
    inputs = [torch.randn(shape), torch.randn(shape[-1])]
    assert_agrees(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), inputs)


def test_known_values():
    # The root mean square of (3, 4) is sqrt(12.5).
    out = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0)
    assert out.tolist() == pytest.approx([3 / math.sqrt(12.5), 8 / math.sqrt(12.5)], rel=1e-6)


def test_gradient_is_orthogonal_to_the_input():
    # Without eps the output does not change with the input's length.
    x = torch.randn(6, 9, requires_grad=True)
    rms_norm(x, torch.randn(9), 0.0).sin().sum().backward()
    assert (x.grad * x).sum(-1).abs().max() < 1e-5


def test_eps_keeps_a_zero_row_finite():
    x = torch.zeros(2, 4, requires_grad=True)
    out = rms_norm(x, torch.ones(4), 1e-6)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 4))
    assert x.grad.tolist() == pytest.approx(torch.full((2, 4), 1e3))


def test_non_contiguous_input(assert_agrees):
    weight = torch.randn(5)
    assert_agrees(
        lambda x: rms_norm(x.transpose(0, 1), weight, 1e-6),
        lambda x: rms_norm_reference(x.transpose(0, 1), weight.double(), 1e-6),
        [torch.randn(3, 4, 5)],
    )


def test_frozen_weight_and_no_grad():
    weight, x = torch.randn(5), torch.randn(3, 5, requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is None and x.grad is not None
    with torch.no_grad():
        assert not rms_norm(x, weight, 1e-6).requires_grad


def test_bf16_statistics_are_fp32():
    x, weight = (torch.randn(4, 64) * 100).bfloat16(), torch.randn(64).bfloat16()
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rms_norm(x.float(), weight.float(), 1e-6).bfloat16())


def test_a_wrong_weight_is_named():
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(torch.randn(2, 4), torch.randn(3), 1e-6)
