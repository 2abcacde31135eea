import pytest
import torch
from torch.nn import functional

from sigmoe.kernels.expert_mlp import expert_mlp
from sigmoe.kernels.expert_mlp.reference import expert_mlp_reference

COUNTS = [
    [3, 1, 0, 7, 2, 0, 4],  # empty experts
    [0, 0, 19, 0, 0, 0, 0],  # all rows to one
    [0, 0, 0, 0, 0, 0, 0],  # no rows at all
    [1],
    [5, 6],
]


def weights(E, D, F):
    return torch.randn(E, 2 * F, D), torch.randn(E, D, F)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("D", "F"), [(5, 3), (16, 33)])
def test_matches_the_reference(assert_agrees, counts, D, F):
    count = torch.tensor(counts)
    assert_agrees(
        lambda x, w, d: expert_mlp(x, count, w, d),
        lambda x, w, d: expert_mlp_reference(x, count, w, d),
        [torch.randn(sum(counts), D), *weights(len(counts), D, F)],
    )


def test_one_expert_is_a_plain_feed_forward():
    x, (gate_up, down) = torch.randn(6, 5), weights(1, 5, 4)
    want = functional.linear(
        functional.silu(functional.linear(x, gate_up[0, :4])) * functional.linear(x, gate_up[0, 4:]), down[0]
    )
    assert torch.allclose(expert_mlp(x, torch.tensor([6]), gate_up, down), want, atol=1e-5)


def test_an_empty_expert_gets_a_zero_gradient():
    gate_up, down = (w.requires_grad_() for w in weights(3, 5, 4))
    expert_mlp(torch.randn(6, 5), torch.tensor([4, 0, 2]), gate_up, down).sum().backward()
    for grad in (gate_up.grad, down.grad):
        assert (grad[1] == 0).all() and (grad[[0, 2]] != 0).any(-1).all()


def test_an_expert_computes_the_same_bits_alone():
    counts, x, (gate_up, down) = torch.tensor([13, 40, 21]), torch.randn(74, 32), weights(3, 32, 48)
    grad = torch.randn(74, 32)

    def run(rows, count, *leaves):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        x_rows = x[rows].clone().requires_grad_()
        out = expert_mlp(x_rows, count, *leaves)
        return out.detach(), *torch.autograd.grad(out, [x_rows, *leaves], grad[rows])

    whole = run(slice(0, 74), counts, gate_up, down)
    alone = run(slice(13, 53), torch.tensor([40]), gate_up[1:2], down[1:2])
    for full, part in zip(whole[:2], alone[:2]):
        assert torch.equal(full[13:53], part)
    for full, part in zip(whole[2:], alone[2:]):
        assert torch.equal(full[1:2], part)


def test_only_what_is_asked_for_gets_a_gradient():
    count = torch.tensor([2, 0, 3])
    for wanted in range(3):
        inputs = [torch.randn(5, 4), *weights(3, 4, 2)]
        inputs[wanted].requires_grad_()
        expert_mlp(inputs[0], count, inputs[1], inputs[2]).sum().backward()
        assert [x.grad is not None for x in inputs] == [place == wanted for place in range(3)]
    with torch.no_grad():
        assert not expert_mlp(inputs[0], count, inputs[1], inputs[2]).requires_grad


def test_bf16():
    count, inputs = torch.tensor([2, 0, 3]), [torch.randn(5, 4), *weights(3, 4, 2)]
    narrow = [x.bfloat16().requires_grad_() for x in inputs]
    out = expert_mlp(narrow[0], count, *narrow[1:])
    out.sum().backward()
    want = expert_mlp_reference(narrow[0].detach().double(), count, *(x.detach().double() for x in narrow[1:]))
    assert out.dtype == torch.bfloat16 and ((out - want).norm() / want.norm()) < 3e-2
    assert all(x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() for x in narrow)


def test_counts_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="add up to 4 rows, but 5"):
        expert_mlp(torch.randn(5, 4), torch.tensor([2, 2]), *weights(2, 4, 2))


def test_many_rows_match_the_reference(assert_agrees):
    # Enough rows for padding between one power of two and the next, and for products that run on all threads.
    count = torch.tensor([150, 0, 71, 64])
    assert_agrees(
        lambda x, w, d: expert_mlp(x, count, w, d),
        lambda x, w, d: expert_mlp_reference(x, count, w, d),
        [torch.randn(285, 24), *weights(4, 24, 40)],
    )
