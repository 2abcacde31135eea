import pytest
import torch

from sigmoe.kernels.norm import add_rms_norm, rms_norm
from sigmoe.kernels.norm.reference import rms_norm_reference

# Nothing, one row, rows that leave a tile unfilled, and widths below, at and above powers of two.
SHAPES = [(0, 5), (1, 3), (1, 16), (5, 33), (2, 3, 48)]
EPS = 1e-5


pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")


def norm(x, weight):
    return rms_norm(x, weight, EPS, backend="triton")


def norm_reference(x, weight):
    return rms_norm_reference(x, weight, EPS)


def add_norm(x, branch, weight):
    return add_rms_norm(x, branch, weight, EPS, backend="triton")


def add_norm_reference(x, branch, weight):
    return x + branch, rms_norm_reference(x + branch, weight, EPS)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(assert_agrees, device, shape):
    x, branch, weight = (torch.randn(size, device=device) for size in (shape, shape, shape[-1]))
    assert_agrees(norm, norm_reference, [x, weight])
    assert_agrees(add_norm, add_norm_reference, [x, branch, weight])


def test_rows_too_wide_for_registers(assert_agrees, device):
    # Each program has several rows, so that its part of the weight's gradient is read again.
    x, branch, weight = (torch.randn(size, device=device) for size in ((7, 8200), (7, 8200), 8200))
    assert_agrees(add_norm, add_norm_reference, [x, branch, weight])


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(assert_agrees, device, used):
    inputs = [torch.randn(size, device=device) for size in ((3, 6), (3, 6), 6)]
    frozen = inputs.pop()
    assert_agrees(
        lambda x, branch: add_norm(x, branch, frozen)[used],
        lambda x, branch: add_norm_reference(x, branch, frozen.double())[used],
        inputs,
    )


def test_rows_that_do_not_lie_side_by_side(assert_agrees, device):
    x, branch, weight = (torch.randn(size, device=device) for size in ((4, 3, 5), (3, 4, 10), 5))
    assert_agrees(
        lambda x, branch, weight: add_norm(x.transpose(0, 1), branch[..., ::2], weight),
        lambda x, branch, weight: add_norm_reference(x.transpose(0, 1), branch[..., ::2], weight),
        [x, branch, weight],
    )


def test_only_what_is_asked_for_gets_a_gradient(device):
    whole = [torch.randn(size, device=device).requires_grad_() for size in ((3, 6), (3, 6), 6)]
    sum(out.square().sum() for out in add_norm(*whole)).backward()
    assert whole[0].grad is not None and torch.equal(whole[0].grad, whole[1].grad)
    for wanted in range(3):
        inputs = [x.detach().requires_grad_(place == wanted) for place, x in enumerate(whole)]
        sum(out.square().sum() for out in add_norm(*inputs)).backward()
        assert [x.grad is not None for x in inputs] == [place == wanted for place in range(3)]
        assert torch.equal(inputs[wanted].grad, whole[wanted].grad)
    with torch.no_grad():
        assert not norm(whole[0], whole[2]).requires_grad


def test_no_more_than_the_sum_is_kept(device):
    x, branch, weight = (torch.randn(size, device=device).requires_grad_() for size in ((3, 6), (3, 6), 6))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total, _ = add_norm(x, branch, weight)
    assert sorted(t.numel() for t in kept) == [3, 6, 18]
    assert total.data_ptr() in {t.data_ptr() for t in kept}


def test_torchs_sum_and_norm_are_those_of_two_steps(assert_agrees):
    inputs = [torch.randn(size) for size in ((2, 3, 33), (2, 3, 33), 33)]
    results = []
    for fused in (True, False):
        x, branch, weight = leaves = [one.clone().requires_grad_() for one in inputs]
        if fused:
            total, normed = add_rms_norm(x, branch, weight, EPS)
        else:
            total = x + branch
            normed = rms_norm(total, weight, EPS)
        out = total + normed.sin()
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(map(torch.equal, *results))
    assert_agrees(lambda *x: add_rms_norm(*x, EPS), add_norm_reference, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [768, 4096, 16384])
@pytest.mark.usefixtures("floats")
def test_half_precision(assert_as_good_as, device, dtype, D):
    inputs = [torch.randn(size, device=device).to(dtype) for size in ((700, D), (700, D), D)]
    assert_as_good_as(add_norm, lambda *x: add_rms_norm(*x, EPS), add_norm_reference, inputs)


def test_mistakes_are_named(device):
    x, weight = torch.zeros(2, 4, device=device), torch.zeros(4, device=device)
    for backend in ("torch", "triton"):
        with pytest.raises(ValueError, match="weight has shape"):
            rms_norm(x, weight[1:], EPS, backend=backend)
        with pytest.raises(ValueError, match="weight has shape"):
            add_rms_norm(x, x, weight[1:], EPS, backend=backend)
        for branch in (x[:1], x.double()):
            with pytest.raises(ValueError, match="must have one shape and dtype"):
                add_rms_norm(x, branch, weight, EPS, backend=backend)
    for refused in (x.double(), torch.zeros(1, 16385, device=device)):
        with pytest.raises(ValueError, match="use kernels=torch"):
            rms_norm(refused, torch.zeros_like(refused[0]), EPS, backend="triton")


def test_the_operators_keep_torchs_rules(device):
    from sigmoe.kernels.norm.triton import rms_norm_forward

    x, branch, weight = (torch.randn(size, device=device).requires_grad_() for size in ((3, 6), (3, 6), 6))
    for arguments in ((x, None, weight, EPS), (x, branch, weight, EPS)):
        torch.library.opcheck(rms_norm_forward, arguments)
