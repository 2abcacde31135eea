import pytest
import torch

from sigmoe.kernels.swiglu import swiglu
from sigmoe.kernels.swiglu.reference import swiglu_reference

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")


def op(gate_up):
    return swiglu(gate_up, backend="triton")


# Nothing, one token, several tiles of rows, and of columns.
@pytest.mark.parametrize("shape", [(0, 6), (1, 2), (9, 14), (3, 2, 66), (1, 200)])
def test_matches_the_reference(assert_agrees, device, shape):
    assert_agrees(op, swiglu_reference, [torch.randn(shape, device=device)])


def test_large_gates_neither_overflow_nor_vanish(device):
    gate_up = torch.tensor([[200.0, -200.0, 1.0, 1.0]], device=device, requires_grad=True)
    out = op(gate_up)
    out.sum().backward()
    assert out.tolist() == [[200.0, 0.0]]
    assert gate_up.grad.tolist() == [[1.0, 0.0, 200.0, 0.0]]


def test_input_and_gradient_that_do_not_lie_side_by_side(assert_agrees, device):
    assert_agrees(
        lambda x: op(x.t()).t().flatten()[::2],
        lambda x: swiglu_reference(x.t()).t().flatten()[::2],
        [torch.randn(6, 5, device=device)],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("floats")
def test_half_precision(assert_as_good_as, device, dtype):
    assert_as_good_as(op, swiglu, swiglu_reference, [torch.randn(300, 3000, device=device).to(dtype)])


def test_what_it_cannot_do_is_refused(device):
    with pytest.raises(ValueError, match="must be even"):
        op(torch.zeros(2, 3, device=device))
    with pytest.raises(ValueError, match="use kernels=torch"):
        op(torch.zeros(2, 4, device=device).double())


def test_the_operator_keeps_torchs_rules(device):
    from sigmoe.kernels.swiglu.triton import swiglu_of

    torch.library.opcheck(swiglu_of, (torch.randn(3, 6, device=device).requires_grad_(),))
