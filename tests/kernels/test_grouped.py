import pytest
import torch

from sigmoe.kernels.grouped import grouped_linear
from sigmoe.kernels.grouped.reference import grouped_linear_reference

# Rows of each expert (some empty, all to one, none at all, one row), depth, columns: sizes that fit no block.
CASES = [
    ([3, 1, 0, 7, 2, 0, 4], 5, 6),
    ([0, 0, 70, 0, 0, 0, 0], 9, 3),
    ([0] * 7, 4, 5),
    ([1], 1, 1),
    ([65, 17], 33, 21),
]


def draw(counts, D, N):
    return torch.randn(sum(counts), D), torch.randn(len(counts), N, D)


@pytest.mark.parametrize(("counts", "D", "N"), CASES)
def test_matches_the_reference(assert_agrees, counts, D, N):
    count = torch.tensor(counts)
    assert_agrees(
        lambda rows, weight: grouped_linear(rows, count, weight),
        lambda rows, weight: grouped_linear_reference(rows, count, weight),
        list(draw(counts, D, N)),
    )


def test_only_what_is_asked_for_gets_a_gradient():
    rows, weight = draw([2, 0, 3], 4, 5)
    for wanted in range(2):
        inputs = [x.detach().requires_grad_(place == wanted) for place, x in enumerate((rows, weight))]
        grouped_linear(inputs[0], torch.tensor([2, 0, 3]), inputs[1]).sum().backward()
        assert [x.grad is not None for x in inputs] == [place == wanted for place in range(2)]


def test_an_expert_sees_its_own_rows_alone():
    rows, weight = draw([5, 7], 16, 16)
    both = grouped_linear(rows, torch.tensor([5, 7]), weight)
    assert torch.equal(both[5:], grouped_linear(rows[5:], torch.tensor([7]), weight[1:]))


def test_counts_must_add_up():
    rows, weight = draw([2, 3], 4, 5)
    with pytest.raises(ValueError, match="counts add up to 4 rows, but 5 were given"):
        grouped_linear(rows, torch.tensor([2, 2]), weight)
