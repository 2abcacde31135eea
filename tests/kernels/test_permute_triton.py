import pytest
import torch

from sigmoe.kernels.permute import combine, permute
from sigmoe.kernels.permute.reference import combine_reference, permute_reference
from sigmoe.kernels.positions import positions

# Tokens, top-k, width: widths below, between and above powers of two, and above the longest block.
SIZES = [(1, 1, 1), (0, 2, 5), (9, 2, 48), (5, 8, 16), (2, 1, 2100)]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")


def routing(device, num_tokens, top_k, capacity=None):
    expert = torch.randint(0, 7, (1, num_tokens, top_k), device=device)
    return positions(expert, 7, capacity_B=None if capacity is None else torch.tensor([capacity], device=device))


@pytest.mark.parametrize("capacity", [None, 0, 2])
@pytest.mark.parametrize(("T", "K", "D"), SIZES)
def test_permute_matches_the_reference(assert_agrees, device, T, K, D, capacity):
    where = routing(device, T, K, capacity)
    x = torch.randn(T, D, device=device)
    assert_agrees(lambda x: permute(x, where, K, backend="triton"), lambda x: permute_reference(x, where, K), [x])


@pytest.mark.parametrize("capacity", [None, 0, 2])
@pytest.mark.parametrize(("T", "K", "D"), SIZES)
def test_combine_matches_the_reference(assert_agrees, device, T, K, D, capacity):
    where = routing(device, T, K, capacity)
    inputs = [torch.randn(where.source_R.numel(), D, device=device), torch.randn(T, K, device=device)]
    assert_agrees(
        lambda x, w: combine(x, w, where, backend="triton"), lambda x, w: combine_reference(x, w, where), inputs
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.usefixtures("floats")
def test_half_precision(assert_agrees, device, dtype):
    where, tolerance = routing(device, 300, 8), TOLERANCE[dtype]
    x, weight = torch.randn(300, 768, device=device).to(dtype), torch.rand(300, 8, device=device)
    rows = torch.randn(2400, 768, device=device).to(dtype)
    assert_agrees(
        lambda x: permute(x, where, 8, backend="triton"), lambda x: permute_reference(x, where, 8), [x], tolerance
    )
    assert_agrees(
        lambda r, w: combine(r, w, where, backend="triton"),
        lambda r, w: combine_reference(r, w, where),
        [rows, weight],
        tolerance,
    )


def test_strides_do_not_matter(assert_agrees, device):
    where = routing(device, 5, 2)
    assert_agrees(
        lambda x: permute(x.t(), where, 2, backend="triton").t().flatten()[::2],
        lambda x: permute_reference(x.t(), where, 2).t().flatten()[::2],
        [torch.randn(6, 5, device=device)],
    )
    assert_agrees(
        lambda r, w: combine(r.t(), w.t(), where, backend="triton").t().flatten()[::2],
        lambda r, w: combine_reference(r.t(), w.t(), where).t().flatten()[::2],
        [torch.randn(6, 10, device=device), torch.randn(2, 5, device=device)],
    )


def test_a_dropped_pair_cannot_bring_nan(device):
    where = positions(
        torch.zeros(1, 2, 1, dtype=torch.int64, device=device), 1, capacity_B=torch.tensor([1], device=device)
    )
    weight = torch.tensor([[1.0], [float("inf")]], device=device, requires_grad=True)
    out = combine(torch.ones(1, 2, device=device), weight, where, backend="triton")
    out.sum().backward()
    assert out.tolist() == [[1, 1], [0, 0]]
    assert weight.grad.flatten().tolist() == [2, 0]


def test_fixed_weights_get_no_gradient(device):
    where = routing(device, 3, 2)
    rows = torch.randn(6, 4, device=device, requires_grad=True)
    weight = torch.rand(3, 2, device=device)
    combine(rows, weight, where, backend="triton").sum().backward()
    got, rows.grad = rows.grad, None
    combine(rows, weight, where).sum().backward()
    assert torch.equal(got, rows.grad)


def test_fp64_is_refused(device):
    where = routing(device, 3, 2)
    for call in (
        lambda: permute(torch.zeros(3, 4, device=device).double(), where, 2, backend="triton"),
        lambda: combine(
            torch.zeros(6, 4, device=device).double(), torch.ones(3, 2, device=device), where, backend="triton"
        ),
    ):
        with pytest.raises(ValueError, match=r"not torch\.float64: use kernels=torch"):
            call()


def test_the_operators_keep_torchs_rules(device):
    from sigmoe.kernels.permute.triton import combine_forward, permute_forward

    where = routing(device, 3, 2)
    x, rows = torch.randn(3, 4, device=device, requires_grad=True), torch.randn(6, 4, device=device, requires_grad=True)
    weight = torch.rand(3, 2, device=device, requires_grad=True)
    torch.library.opcheck(permute_forward, (x, where.row_TK, 6))
    torch.library.opcheck(combine_forward, (rows, weight, where.row_TK))
