import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmoe.moe.keyed import keyed_uniform, numpy_generator, seed_of

PARTS = st.lists(st.integers(-5, 5) | st.text("ab1:\x1f", max_size=3), max_size=4).map(tuple)


def test_every_part_its_type_and_its_order_count():
    keys = [(), ("",), (1,), ("1",), (1, 2), (2, 1), (12,), ("1", 2), (1, "2"), ("a", "b"), ("ab",), ("a\x1fstr:b",)]
    assert len({seed_of(*key) for key in keys}) == len(keys)


@settings(max_examples=200, deadline=None)
@given(PARTS, PARTS)
def test_different_keys_have_different_seeds(one, other):
    assert (seed_of(*one) == seed_of(*other)) == (one == other)


def test_seed_is_the_head_of_a_sha256():
    digest = hashlib.sha256(b"str:jitter\x1fint:3").digest()
    assert seed_of("jitter", 3) == int.from_bytes(digest[:8], "little") == 2907597458383012554


def test_the_generator_repeats_and_differs():
    first, again, other = (numpy_generator("x", i).random(4) for i in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def splitmix(state):
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_uniform_is_splitmix_in_whole_numbers(seed):
    index = [0, 1, 7, 2**40]
    drawn = keyed_uniform(seed, torch.tensor(index), 3)
    golden = 0x9E3779B97F4A7C15
    for (row, i), column in itertools.product(enumerate(index), range(3)):
        bits = splitmix((splitmix((i * golden + seed) % 2**64) + column * golden) % 2**64)
        assert drawn[row, column] == (bits >> 40) / 2**24


def test_uniform_golden_value():
    drawn = keyed_uniform(seed_of("golden"), torch.tensor([5]), 4)
    assert (drawn[0] * 2**24).to(torch.int64).tolist() == [13277835, 1349449, 2426843, 4145592]


def test_uniform_depends_on_seed_index_and_column_alone():
    index = torch.tensor([9, 4, 1000, 4, 0])
    whole = keyed_uniform(3, index, 6)
    assert torch.equal(whole[1], whole[3])
    assert torch.equal(keyed_uniform(3, index[2:], 6), whole[2:])
    assert torch.equal(keyed_uniform(3, index.flip(0), 6), whole.flip(0))
    assert torch.equal(keyed_uniform(3, index, 4), whole[:, :4])
    assert not torch.equal(keyed_uniform(4, index, 6), whole)


def test_uniform_is_uniform():
    drawn = keyed_uniform(11, torch.arange(500), 40)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.double().mean() - 0.5) < 0.01
    assert abs(drawn.double().var() - 1 / 12) < 0.005
    assert drawn.unique().numel() > 0.99 * drawn.numel()
    neighbours = torch.corrcoef(drawn.double().T)
    assert (neighbours - torch.eye(40)).abs().max() < 0.25
