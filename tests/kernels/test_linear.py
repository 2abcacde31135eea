import pytest
import torch

from sigmoe.kernels.linear import linear, padded, padded_size, product
from sigmoe.kernels.linear.reference import linear_reference


@pytest.mark.parametrize(("shape", "width"), [((0, 5), 3), ((1, 7), 4), ((3, 5, 33), 17), ((2, 65, 16), 1)])
def test_matches_the_reference(assert_agrees, shape, width):
    assert_agrees(linear, linear_reference, [torch.randn(shape), torch.randn(width, shape[-1])])


def test_known_values():
    out = linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, -1.0], [1.0, 0.0]]))
    assert out.tolist() == [[11, -2, 1]]


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(65, 33, 129), (1, 1, 1), (0, 4, 3), (4, 0, 3), (4, 3, 0), (128, 64, 256)])
def test_product_of_any_view(M, N, K, a_transposed, b_transposed):
    a = torch.randn(K, M).t() if a_transposed else torch.randn(M, K)
    b = torch.randn(K, N).t() if b_transposed else torch.randn(N, K)
    want = (a.double()[:, None] * b.double()[None]).sum(-1)
    got = product(a, b)
    assert got.shape == (M, N) and got.is_contiguous()
    assert (got - want).norm() <= 1e-6 * want.norm()


def test_product_of_slices():
    whole = torch.randn(40, 50)
    a, b = whole[5:20, 3:33], whole[20:33, 7:37]
    assert torch.allclose(product(a, b), a.contiguous() @ b.t().contiguous(), atol=1e-4)


@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 63, 64, 65, 1000, 1023, 1025, 5000])
def test_padding_adds_zero_rows_alone(num_rows):
    x = torch.randn(num_rows, 3)
    out = padded(x)
    assert out.shape[0] == padded_size(num_rows, x) >= num_rows
    assert torch.equal(out[:num_rows], x) and not out[num_rows:].any()


def test_padding_leaves_few_sizes():
    like = torch.empty(0)
    sizes = {padded_size(n, like) for n in range(1, 8193)}
    if padded_size(1, like) == 1:
        pytest.skip("products of any size are cheap here: nothing is padded")
    assert len(sizes) <= 48
    assert all(padded_size(n, like) <= 1.125 * n for n in range(512, 8193))
    assert all(padded_size(n, like) == n for n in (16, 64, 128, 512, 2048, 4096))


def test_rows_do_not_depend_on_the_padding():
    x, weight = torch.randn(70, 32), torch.randn(48, 32)
    assert torch.equal(linear(x, weight), product(torch.cat([x, torch.randn(58, 32)]), weight)[:70])


def test_only_what_is_asked_for_gets_a_gradient():
    for wanted in range(2):
        inputs = [torch.randn(5, 4), torch.randn(3, 4)]
        inputs[wanted].requires_grad_()
        linear(*inputs).sum().backward()
        assert [x.grad is not None for x in inputs] == [wanted == 0, wanted == 1]
    with torch.no_grad():
        assert not linear(*inputs).requires_grad


def test_bf16():
    x, weight = torch.randn(5, 4).bfloat16().requires_grad_(), torch.randn(3, 4).bfloat16().requires_grad_()
    out = linear(x, weight)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert torch.allclose(out.float(), x.detach().float() @ weight.detach().float().t(), atol=5e-2)


def test_widths_that_differ_are_named():
    with pytest.raises(ValueError, match="the input is 4 wide, the weight takes 5"):
        linear(torch.randn(2, 4), torch.randn(3, 5))
