import pytest
import torch

from sigmoe.kernels.positions import positions
from sigmoe.kernels.positions.reference import positions_reference

# Shapes of choices, experts, capacities: one pair, none, several tiles, more sequences than a block has, K of 8.
CASES = [
    ((1, 1, 1), 1, None),
    ((0, 4, 2), 3, None),
    ((2, 0, 2), 3, [1, 1]),
    ((3, 9, 2), 7, None),
    ((3, 9, 2), 7, [0, 3, 5]),
    ((2, 11, 8), 9, [7, 9]),
    ((1, 23, 1), 64, None),
    ((5, 3, 1), 2, [1, 0, 2, 1, 1]),
    ((2, 3, 2), 3, [0, 0]),
]


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")


def check(expert, num_experts, capacity):
    limits = None if capacity is None else torch.tensor(capacity, device=expert.device)
    want = positions_reference(expert, num_experts, capacity_B=limits)
    for _ in range(2):
        got = positions(expert, num_experts, capacity_B=limits, backend="triton")
        assert got.has_tail is (capacity is not None)
        for field in ("row_TK", "source_R", "count_E"):
            one = getattr(got, field)
            assert torch.equal(one.cpu(), getattr(want, field)) and one.dtype == torch.int64, field


@pytest.mark.parametrize(("shape", "num_experts", "capacity"), CASES)
def test_matches_the_queues_of_the_reference(device, shape, num_experts, capacity):
    check(torch.randint(0, num_experts, shape, device=device), num_experts, capacity)


@pytest.mark.parametrize("capacity", [None, [4, 30]])
def test_all_tokens_to_one_expert(device, capacity):
    check(torch.full((2, 21, 1), 3, device=device), 5, capacity)


def test_non_contiguous_choices(device):
    check(torch.randint(0, 5, (2, 2, 7), device=device).transpose(1, 2), 5, None)


def test_too_many_experts_are_refused(device):
    with pytest.raises(ValueError, match="up to 16384 experts, got 20000"):
        positions(torch.zeros(1, 1, 1, dtype=torch.int64, device=device), 20000, backend="triton")


def test_the_operator_keeps_torchs_rules(device):
    from sigmoe.kernels.positions.triton import order

    torch.library.opcheck(order, (torch.randint(0, 3, (1, 5, 2), device=device), 3, None))
