import pytest
import torch

from sigmoe.moe.balance import (
    batch_balance_sum,
    next_bias,
    next_fractions,
    sequence_balance_sum,
    uniform_fractions,
)


def test_sequence_balance_known_answer():
    # Sequence 0: 4 tokens, K 1, counts 3/1/0, mean probabilities 0.5/0.25/0.25: 3 * (0.75*0.5 + 0.25*0.25) = 1.3125.
    # Sequence 1: all on expert 2, which has mean probability 1: 3.
    count_BE = torch.tensor([[3, 1, 0], [0, 0, 4]])
    prob_BE = torch.tensor([[2.0, 1.0, 1.0], [0.0, 0.0, 4.0]])
    assert float(sequence_balance_sum(count_BE, prob_BE, 1, 4)) == pytest.approx(4 * 1.3125 + 4 * 3)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_perfect_balance_is_one_a_token(top_k):
    count_BE, prob_BE = torch.full((5, 3), 2 * top_k), torch.full((5, 3), 2.0)
    assert float(sequence_balance_sum(count_BE, prob_BE, top_k, 6)) / (5 * 6) == pytest.approx(1.0)
    assert float(batch_balance_sum(torch.full((3,), 1 / 3), prob_BE)) / (5 * 6) == pytest.approx(1.0)


def test_batch_balance_known_answer():
    # 2 experts, old fractions 0.75 and 0.25, probabilities summed over the batch's 6 tokens 4 and 2.
    prob_BE = torch.tensor([[3.0, 1.0], [1.0, 1.0]], requires_grad=True)
    loss = batch_balance_sum(torch.tensor([0.75, 0.25]), prob_BE)
    assert float(loss.detach()) == pytest.approx(2 * (0.75 * 4 + 0.25 * 2))
    loss.backward()
    assert torch.equal(prob_BE.grad, torch.tensor([[1.5, 0.5], [1.5, 0.5]]))


def test_sequence_balance_of_micro_batches_adds_up():
    torch.manual_seed(0)
    count_BE, prob_BE = torch.randint(0, 9, (6, 4)), torch.rand(6, 4)
    whole = sequence_balance_sum(count_BE, prob_BE, 2, 7)
    parts = sum(sequence_balance_sum(count_BE[i : i + 2], prob_BE[i : i + 2], 2, 7) for i in range(0, 6, 2))
    assert float(parts) == pytest.approx(float(whole), rel=1e-6)


def test_batch_balance_of_micro_batches_adds_up():
    torch.manual_seed(0)
    fraction_E, prob_BE = torch.rand(4), torch.rand(6, 4)
    parts = sum(batch_balance_sum(fraction_E, prob_BE[i : i + 2]) for i in range(0, 6, 2))
    assert float(parts) == pytest.approx(float(batch_balance_sum(fraction_E, prob_BE)), rel=1e-6)


def test_next_fractions():
    old_NE = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    new_NE = next_fractions(old_NE, torch.tensor([[3, 1, 0], [0, 0, 0]]))
    assert torch.equal(new_NE, torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.25, 0.75]]))
    assert new_NE.dtype == torch.float32
    assert torch.equal(old_NE, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]]))


def test_uniform_fractions():
    fraction_NE = uniform_fractions(((0, 1), (1, 2, 3, 4)), 5)
    expected = [[0.5, 0.5, 0, 0, 0], [0, 0.25, 0.25, 0.25, 0.25]]
    assert torch.equal(fraction_NE, torch.tensor(expected))


def test_next_bias_lifts_the_idle_and_lowers_the_busy():
    bias_E = torch.tensor([0.5, 0.0, -0.5, 0.0])
    new_E = next_bias(bias_E, torch.tensor([[4, 8, 0, 4]]), ((0, 1, 2, 3),), 0.25)
    assert torch.equal(new_E, torch.tensor([0.5, -0.25, -0.25, 0.0]))
    assert torch.equal(bias_E, torch.tensor([0.5, 0.0, -0.5, 0.0]))


def test_next_bias_adds_up_an_expert_of_two_groups():
    # Expert 1 is five over the mean of group a and one under that of group b: four over in all.
    count_NE = torch.tensor([[0, 10, 0], [0, 1, 3]])
    new_E = next_bias(torch.zeros(3), count_NE, ((0, 1), (1, 2)), 0.5)
    assert torch.equal(new_E, torch.tensor([0.5, -0.5, -0.5]))


def test_next_bias_stands_still_without_tokens():
    assert torch.equal(
        next_bias(torch.ones(3), torch.zeros(2, 3, dtype=torch.int64), ((0,), (1, 2)), 0.1), torch.ones(3)
    )
