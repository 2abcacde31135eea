import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmoe.kernels.positions import positions
from sigmoe.kernels.positions.reference import positions_reference


@st.composite
def routings(draw):
    E = draw(st.integers(1, 7))
    B, S, K = draw(st.integers(0, 3)), draw(st.integers(0, 8)), draw(st.integers(1, 3))
    size = B * S * K
    expert = torch.tensor(draw(st.lists(st.integers(0, E - 1), min_size=size, max_size=size)), dtype=torch.int64)
    capacity = draw(st.none() | st.lists(st.integers(0, 5), min_size=B, max_size=B))
    return expert.view(B, S, K), E, None if capacity is None else torch.tensor(capacity, dtype=torch.int64)


@settings(max_examples=150, deadline=None)
@given(routings())
def test_matches_the_queues_of_the_reference(routing):
    expert, E, capacity = routing
    got, want = positions(expert, E, capacity_B=capacity), positions_reference(expert, E, capacity_B=capacity)
    assert not got.has_tail
    for field, one, other in zip(got._fields[:3], got, want):
        assert torch.equal(one, other), field
        assert one.dtype == torch.int64


@settings(max_examples=150, deadline=None)
@given(routings())
def test_properties(routing):
    expert, E, capacity = routing
    B, S, K = expert.shape
    row, source, count, _ = positions(expert, E, capacity_B=capacity)
    flat = expert.flatten()
    # Rows are sorted by expert and, inside one, by pair; counts are the runs' lengths.
    keys = [(int(flat[pair]), pair) for pair in source.tolist()]
    assert keys == sorted(set(keys))
    assert count.tolist() == [sum(key[0] == e for key in keys) for e in range(E)]
    # row and source are inverse to each other, and every other pair is dropped.
    assert row.flatten()[source].tolist() == list(range(source.numel()))
    assert (row == -1).sum() == row.numel() - source.numel()
    kept = row.view(B, S, K) >= 0
    for b in range(B):
        for e in range(E):
            pairs = kept[b].flatten()[expert[b].flatten() == e].tolist()
            room = len(pairs) if capacity is None else int(capacity[b])
            assert pairs == [place < room for place in range(len(pairs))]


def test_known_order():
    got = positions(torch.tensor([[[2, 0], [0, 2], [2, 1]]]), 4)
    assert got.source_R.tolist() == [1, 2, 5, 0, 3, 4]
    assert got.row_TK.tolist() == [[3, 0], [1, 4], [5, 2]]
    assert got.count_E.tolist() == [2, 1, 3, 0]


def test_capacity_counts_each_sequence_alone():
    got = positions(torch.zeros(2, 3, 1, dtype=torch.int64), 2, capacity_B=torch.tensor([1, 2]))
    assert got.row_TK.flatten().tolist() == [0, -1, -1, 1, 2, -1]
    assert got.source_R.tolist() == [0, 3, 4]
    assert got.count_E.tolist() == [3, 0]


def test_no_capacity_drops_all():
    got = positions(torch.zeros(2, 3, 2, dtype=torch.int64), 3, capacity_B=torch.zeros(2, dtype=torch.int64))
    assert got.source_R.numel() == 0 and (got.row_TK == -1).all() and got.count_E.tolist() == [0, 0, 0]


def test_no_tokens():
    got = positions(torch.empty(0, 4, 2, dtype=torch.int64), 3)
    assert got.row_TK.shape == (0, 2) and got.source_R.shape == (0,) and got.count_E.tolist() == [0, 0, 0]


def test_non_contiguous_choices():
    expert = torch.randint(0, 5, (2, 2, 7)).transpose(1, 2)
    assert torch.equal(positions(expert, 5).source_R, positions(expert.contiguous(), 5).source_R)
