"""What inference runs beside the operations that train: linear maps over packed weights, routed experts, choices."""

import pytest
import torch

from sigmoe.kernels.expert_mlp import routed_mlp
from sigmoe.kernels.expert_mlp.reference import expert_mlp_reference
from sigmoe.kernels.gate import choose, gate
from sigmoe.kernels.linear import linear_forward, packed
from sigmoe.kernels.rope import rope, rotate, rotation


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("pack", [lambda weight: weight, packed], ids=["plain", "packed"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 32), (33, 257)])
def test_linear(pack, shape):
    weight_ND = torch.randn(shape)
    kept_ND = pack(weight_ND)
    for rows in (1, 2, 15, 16, 17, 40):
        x_TD = torch.randn(rows, shape[1])
        got_TN = linear_forward(x_TD, kept_ND)
        assert got_TN.shape == (rows, shape[0])
        assert error(got_TN, x_TD.double() @ weight_ND.double().T) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_not_packed(dtype):
    weight_ND = torch.randn(4, 3).to(dtype)
    assert packed(weight_ND) is weight_ND
    assert linear_forward(weight_ND[:, :3], weight_ND).dtype == dtype


def test_the_place_of_a_weight_does_not_touch_the_bits():
    stack_END = torch.randn(5, 19, 23)
    for rows in (1, 2, 5):
        x_TD = torch.randn(rows, 23)
        for weight_ND in stack_END:
            for kept in (lambda weight: weight, packed):
                assert torch.equal(linear_forward(x_TD, kept(weight_ND)), linear_forward(x_TD, kept(weight_ND.clone())))


def routed(T, K, E, D=7, F=5):
    expert_TK = torch.stack([torch.randperm(E)[:K] for _ in range(T)]) if T else torch.zeros(0, K, dtype=torch.int64)
    return torch.randn(T, D), expert_TK, torch.rand(T, K), torch.randn(E, 2 * F, D), torch.randn(E, D, F)


@pytest.mark.parametrize(
    "pack", [lambda stack: stack, lambda stack: tuple(map(packed, stack))], ids=["plain", "packed"]
)
@pytest.mark.parametrize(("T", "K", "E"), [(1, 1, 1), (1, 2, 8), (2, 3, 3), (9, 2, 5), (40, 2, 2)])
def test_routed_experts(pack, T, K, E):
    x_TD, expert_TK, weight_TK, gate_up, down = routed(T, K, E)
    want_TD = torch.zeros(T, 7, dtype=torch.float64)
    for t in range(T):
        for expert, weight in zip(expert_TK[t].tolist(), weight_TK[t].double()):
            count_E = torch.eye(E, dtype=torch.int64)[expert]
            out_1D = expert_mlp_reference(x_TD[t : t + 1].double(), count_E, gate_up.double(), down.double())
            want_TD[t] += weight * out_1D[0]
    got_TD = routed_mlp(x_TD, expert_TK, weight_TK, pack(gate_up), pack(down))
    assert error(got_TD, want_TD) < 1e-6
    assert torch.equal(routed_mlp(x_TD, expert_TK, weight_TK, pack(gate_up), pack(down)), got_TD)


def test_routed_experts_sum_in_fp32():
    inputs = [x.bfloat16() if x.is_floating_point() else x for x in routed(3, 2, 4)]
    inputs[2] = inputs[2].float()
    assert routed_mlp(*inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("bias", [None, torch.tensor([0.0, 0.5, -0.5, 0.0, 0.2])])
def test_choices_are_the_gates(bias, renormalize):
    logits_BSE = torch.randn(3, 7, 5)
    logits_BSE[0] = 0.0  # ties
    want = gate(logits_BSE, 2, bias_E=bias, renormalize=renormalize)
    expert_BSK, weight_BSK, prob_BSE = choose(logits_BSE, 2, bias_E=bias, renormalize=renormalize)
    assert torch.equal(expert_BSK, want.expert_BSK)
    assert torch.equal(weight_BSK, want.weight_BSK)
    assert torch.equal(prob_BSE.sum(1), want.prob_BE)


@pytest.mark.parametrize("norm", [None, 6, 24])
def test_rotation_is_ropes(norm):
    x_BSHC, position_BS = torch.randn(2, 3, 4, 6), torch.tensor([[0, 1, 2], [7, 8, 300]])
    weight = None if norm is None else torch.rand(norm)
    cos, sin = rotation(position_BS, 100.0, 6, torch.float32)
    got = rotate(x_BSHC, cos, sin, norm_weight=weight, eps=1e-3)
    assert torch.equal(got, rope(x_BSHC, position_BS, 100.0, norm_weight=weight, eps=1e-3))
