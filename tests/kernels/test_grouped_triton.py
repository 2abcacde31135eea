import pytest
import torch

from sigmoe.kernels.grouped import grouped_linear
from sigmoe.kernels.grouped.reference import grouped_linear_reference

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Rows of each expert (some empty, all to one, none at all, one row, full blocks and one more), depth, columns.
CASES = [
    ([3, 1, 0, 7, 2, 0, 4], 16, 16),
    ([0, 0, 33, 0, 0, 0, 0], 48, 16),
    ([0] * 7, 16, 32),
    ([1], 16, 80),
    ([16, 17], 32, 16),
]


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")


def draw(device, counts, D, N):
    count = torch.tensor(counts, device=device)
    return count, [torch.randn(shape, device=device) for shape in ((sum(counts), D), (len(counts), N, D))]


def assert_grouped_agrees(assert_agrees, count, inputs, tolerance=1e-5):
    assert_agrees(
        lambda rows, weight: grouped_linear(rows, count, weight, backend="triton"),
        lambda rows, weight: grouped_linear_reference(rows, count, weight),
        inputs,
        tolerance,
    )


@pytest.mark.parametrize(("counts", "D", "N"), CASES)
def test_matches_the_reference(assert_agrees, device, counts, D, N):
    assert_grouped_agrees(assert_agrees, *draw(device, counts, D, N))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.usefixtures("floats")
def test_half_precision(assert_agrees, device, dtype):
    count, (rows, weight) = draw(device, [300, 0, 128, 1, 700], 400, 272)
    assert_grouped_agrees(assert_agrees, count, [rows.to(dtype), (weight / 20).to(dtype)], TOLERANCE[dtype])


def test_strides_do_not_matter(device):
    count, inputs = draw(device, [3, 0, 4], 32, 16)
    results = []
    for strided in (False, True):
        leaves = [(x.mT.contiguous().mT if strided else x.clone()).requires_grad_() for x in inputs]
        assert leaves[0].is_contiguous() is not strided
        out = grouped_linear(leaves[0], count, leaves[1], backend="triton")
        grad = out.detach().mT.contiguous().mT if strided else out.detach()
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(map(torch.equal, *results))


def test_only_what_is_asked_for_gets_a_gradient(device):
    count, whole = draw(device, [2, 0, 3], 16, 16)
    for wanted in range(2):
        inputs = [x.detach().requires_grad_(place == wanted) for place, x in enumerate(whole)]
        grouped_linear(inputs[0], count, inputs[1], backend="triton").sum().backward()
        assert [x.grad is not None for x in inputs] == [place == wanted for place in range(2)]


@pytest.mark.parametrize(
    ("D", "N", "named"), [(24, 16, "D as a multiple of 16, not 24"), (16, 40, "N as a multiple of 16, not 40")]
)
def test_dimensions_that_do_not_fit_are_refused(device, D, N, named):
    count, (rows, weight) = draw(device, [2, 1], D, N)
    with pytest.raises(ValueError, match=named):
        grouped_linear(rows, count, weight, backend="triton")


def test_other_dtypes_are_refused(device):
    count, (rows, weight) = draw(device, [2, 1], 16, 16)
    for other in ((rows.double(), weight.double()), (rows, weight.half())):
        with pytest.raises(ValueError, match=r"throughout, not .*: use kernels=torch"):
            grouped_linear(other[0], count, other[1], backend="triton")


def test_the_operator_keeps_torchs_rules(device):
    from sigmoe.kernels.grouped.triton import grouped_linear_forward

    count, (rows, weight) = draw(device, [2, 0, 1], 16, 16)
    torch.library.opcheck(grouped_linear_forward, (rows.requires_grad_(), count, weight.requires_grad_()))
