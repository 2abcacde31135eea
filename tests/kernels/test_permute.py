import pytest
import torch

from sigmoe.kernels.permute import combine, permute
from sigmoe.kernels.permute.reference import combine_reference, permute_reference
from sigmoe.kernels.positions import positions

CAPACITIES = [None, [0, 2, 5], [0, 0, 0]]


def routing(shape, num_experts=7, capacity=None):
    expert = torch.randint(0, num_experts, shape)
    return positions(expert, num_experts, capacity_B=None if capacity is None else torch.tensor(capacity))


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_permute_matches_the_reference(assert_agrees, top_k, capacity):
    where = routing((3, 9, top_k), capacity=capacity)
    assert_agrees(
        lambda x: permute(x, where, top_k), lambda x: permute_reference(x, where, top_k), [torch.randn(27, 5)]
    )


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_combine_matches_the_reference(assert_agrees, top_k, capacity):
    where = routing((3, 9, top_k), capacity=capacity)
    inputs = [torch.randn(where.source_R.numel(), 5), torch.randn(27, top_k)]
    assert_agrees(lambda x, w: combine(x, w, where), lambda x, w: combine_reference(x, w, where), inputs)


@pytest.mark.parametrize("shape", [(0, 4, 2), (1, 1, 1), (1, 1, 2)])
def test_few_tokens(assert_agrees, shape):
    where, T, K = routing(shape), shape[0] * shape[1], shape[2]
    assert_agrees(lambda x: permute(x, where, K), lambda x: permute_reference(x, where, K), [torch.randn(T, 3)])
    inputs = [torch.randn(T * K, 3), torch.randn(T, K)]
    assert_agrees(lambda x, w: combine(x, w, where), lambda x, w: combine_reference(x, w, where), inputs)


def test_known_values():
    where = positions(torch.tensor([[[1, 0], [0, 1]]]), 2)  # rows: t0 k1, t1 k0 | t0 k0, t1 k1
    rows = permute(torch.tensor([[1.0], [10.0]]), where, 2)
    assert rows.flatten().tolist() == [1, 10, 1, 10]
    out = combine(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[0.5, 2.0], [1.0, 0.25]]), where)
    assert out.flatten().tolist() == [0.5 * 3 + 2 * 1, 1 * 2 + 0.25 * 4]


def test_unit_weights_bring_the_tokens_back():
    x, where = torch.randn(18, 4), routing((2, 9, 1))
    assert torch.equal(combine(permute(x, where, 1), torch.ones(18, 1), where), x)


def test_dropped_pairs_add_nothing_and_have_no_gradient():
    where = positions(torch.tensor([[[0], [0], [1]]]), 2, capacity_B=torch.tensor([1]))  # token 1 is dropped
    x, weight = torch.randn(3, 4, requires_grad=True), torch.rand(3, 1, requires_grad=True)
    out = combine(permute(x, where, 1), weight, where)
    out.sum().backward()
    assert (out[1] == 0).all() and (x.grad[1] == 0).all() and weight.grad[1] == 0
    assert (x.grad[[0, 2]] != 0).all() and (weight.grad[[0, 2]] != 0).all()


def test_a_dropped_pair_cannot_bring_nan():
    where = positions(torch.tensor([[[0], [0]]]), 1, capacity_B=torch.tensor([1]))
    out = combine(torch.ones(1, 2), torch.tensor([[1.0], [3.0]]), where)
    assert out.tolist() == [[1, 1], [0, 0]]


def test_fixed_inputs_get_no_gradient():
    where = routing((1, 5, 2))
    rows, weight = torch.randn(10, 3), torch.rand(5, 2, requires_grad=True)
    combine(rows, weight, where).sum().backward()
    assert rows.grad is None and weight.grad is not None
    rows.requires_grad_()
    combine(rows, weight.detach(), where).sum().backward()
    assert rows.grad is not None


def test_bf16_sums_in_fp32():
    where = routing((2, 5, 3))
    rows = torch.randn(30, 4).bfloat16().requires_grad_()
    weight = torch.rand(10, 3, requires_grad=True)
    out = combine(rows, weight, where)
    out.sum().backward()
    assert out.dtype == rows.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert torch.equal(out, combine(rows.detach().float(), weight.detach(), where).bfloat16())
