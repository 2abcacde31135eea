import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmoe.kernels.gate import gate
from sigmoe.kernels.gate.reference import gate_reference


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("shape", "top_k"), [((3, 5, 7), 1), ((3, 5, 7), 2), ((2, 9, 7), 7), ((1, 1, 1), 1), ((2, 3, 64), 8)]
)
def test_matches_the_reference(assert_agrees, shape, top_k, renormalize):
    assert_agrees(
        lambda x: gate(x, top_k, renormalize=renormalize),
        lambda x: gate_reference(x, top_k, renormalize=renormalize),
        [torch.randn(shape) * 2],
    )


@pytest.mark.parametrize("renormalize", [True, False])
def test_bias_only_selects(assert_agrees, renormalize):
    bias = torch.randn(7)
    assert_agrees(
        lambda x: gate(x, 2, bias_E=bias, renormalize=renormalize),
        lambda x: gate_reference(x, 2, bias_E=bias.double(), renormalize=renormalize),
        [torch.randn(2, 8, 7)],
    )
    forced = gate(torch.randn(2, 8, 7), 1, bias_E=torch.tensor([0, 0, 9.0, 0, 0, 0, 0]), renormalize=False)
    assert (forced.expert_BSK == 2).all() and (forced.weight_BSK < 1).all()


@pytest.mark.parametrize("field", ["weight_BSK", "prob_BE", "z_B"])
def test_gradient_of_one_output_alone(assert_agrees, field):
    assert_agrees(
        lambda x: getattr(gate(x, 2), field), lambda x: getattr(gate_reference(x, 2), field), [torch.randn(2, 5, 7)]
    )


def test_known_values():
    logits = torch.tensor([[[math.log(1), math.log(5), math.log(2), math.log(2)]]])
    chosen = gate(logits, 2)
    assert chosen.expert_BSK.tolist() == [[[1, 2]]]  # 2 and 3 tie
    assert chosen.weight_BSK[0, 0].tolist() == pytest.approx([5 / 7, 2 / 7], rel=1e-6)
    assert gate(logits, 2, renormalize=False).weight_BSK[0, 0].tolist() == pytest.approx([0.5, 0.2], rel=1e-6)
    assert chosen.count_BE.tolist() == [[0, 1, 1, 0]]
    assert chosen.prob_BE[0].tolist() == pytest.approx([0.1, 0.5, 0.2, 0.2], rel=1e-6)
    assert chosen.z_B.tolist() == pytest.approx([math.log(10) ** 2], rel=1e-6)


def test_renormalised_gradient_touches_the_chosen_columns_alone():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    chosen = gate(logits, 2)
    chosen.weight_BSK.pow(2).sum().backward()
    touched = torch.zeros(2, 5, 7).scatter(-1, chosen.expert_BSK, 1.0) > 0
    assert (logits.grad[~touched] == 0).all() and (logits.grad[touched] != 0).all()


def test_a_single_renormalised_choice_weighs_one():
    assert (gate(torch.randn(2, 5, 7) * 50, 1).weight_BSK == 1).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_properties(data):
    E = data.draw(st.integers(1, 9))
    B, S, K = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 6)), data.draw(st.integers(1, E))
    # Few distinct values, so that ties are the rule.
    values = data.draw(st.lists(st.integers(-2, 2), min_size=B * S * E, max_size=B * S * E))
    logits = torch.tensor(values, dtype=torch.float32).view(B, S, E)
    chosen = gate(logits, K)
    for row, picks in zip(logits.reshape(-1, E).tolist(), chosen.expert_BSK.reshape(-1, K).tolist()):
        assert picks == sorted(range(E), key=lambda e: (-row[e], e))[:K]
    assert torch.allclose(chosen.weight_BSK.sum(-1), torch.ones(B, S))
    for b in range(B):
        assert chosen.count_BE[b].tolist() == [chosen.expert_BSK[b].flatten().tolist().count(e) for e in range(E)]
    assert torch.allclose(chosen.prob_BE.sum(-1), torch.full((B,), float(S)))


def test_an_expert_that_the_bias_forbids_is_never_chosen_twice():
    chosen = gate(torch.zeros(1, 1, 3), 3, bias_E=torch.tensor([0.0, -math.inf, 0.0]))
    assert chosen.expert_BSK.tolist() == [[[0, 2, 1]]]


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    chosen = gate(logits, 2)
    (chosen.weight_BSK.sum() + chosen.prob_BE.sum() + chosen.z_B.sum()).backward()
    assert logits.grad.isfinite().all() and chosen.weight_BSK.isfinite().all()


def test_bf16_logits_are_taken_in_fp32():
    logits = torch.randn(2, 4, 7).bfloat16().requires_grad_()
    chosen = gate(logits, 2)
    assert chosen.weight_BSK.dtype == chosen.prob_BE.dtype == chosen.z_B.dtype == torch.float32
    assert torch.equal(chosen.weight_BSK, gate(logits.detach().float(), 2).weight_BSK)
    chosen.z_B.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_no_grad():
    with torch.no_grad():
        assert not gate(torch.randn(1, 2, 3, requires_grad=True), 2).weight_BSK.requires_grad


@pytest.mark.parametrize("top_k", [0, 8])
def test_an_impossible_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match=r"between 1 and the number of experts \(7\)"):
        gate(torch.randn(1, 2, 7), top_k)
