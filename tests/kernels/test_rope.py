import cmath

import pytest
import torch

from sigmoe.kernels.rope import rope
from sigmoe.kernels.rope.reference import rope_reference

THETA = 10000.0


def positions(B, S):
    return torch.randint(0, 500, (B, S))


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (1, 1, 1, 2), (2, 5, 3, 6), (3, 7, 2, 10)])
def test_matches_the_reference(assert_agrees, shape):
    position = positions(*shape[:2])
    assert_agrees(
        lambda x: rope(x, position, THETA), lambda x: rope_reference(x, position, THETA), [torch.randn(shape)]
    )


@pytest.mark.parametrize("per_head", [True, False])
def test_norm_first_matches_the_reference(assert_agrees, per_head):
    position = positions(2, 5)
    assert_agrees(
        lambda x, w: rope(x, position, THETA, norm_weight=w, eps=1e-5),
        lambda x, w: rope_reference(x, position, THETA, norm_weight=w, eps=1e-5),
        [torch.randn(2, 5, 3, 6), torch.randn(6 if per_head else 18)],
    )


def test_known_values_by_complex_rotation():
    # Elements i and i + C/2 are one complex number, turned by position * theta^(-2i/C).
    x = torch.randn(1, 1, 1, 4)
    out = rope(x, torch.tensor([[3]]), 100.0)[0, 0, 0].tolist()
    real = x[0, 0, 0].tolist()
    for i, angle in ((0, 3.0), (1, 0.3)):
        turned = complex(real[i], real[i + 2]) * cmath.exp(1j * angle)
        assert (out[i], out[i + 2]) == pytest.approx((turned.real, turned.imag), rel=1e-5)


def test_position_zero_is_the_identity():
    x = torch.randn(2, 3, 2, 8)
    assert torch.equal(rope(x, torch.zeros(2, 3, dtype=torch.long), THETA), x)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i, j):
        return (rope(q, torch.tensor([[i]]), THETA) * rope(k, torch.tensor([[j]]), THETA)).sum().item()

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)


def test_same_as_transformers():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = modeling.MixtralConfig(hidden_size=24, num_attention_heads=3, num_key_value_heads=3)
    config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    x, position = torch.randn(2, 5, 3, 8), positions(2, 5)
    cos, sin = modeling.MixtralRotaryEmbedding(config)(x, position)
    want, _ = modeling.apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    assert torch.allclose(rope(x, position, THETA), want.transpose(1, 2), atol=1e-5)


def test_a_slice_of_a_wider_projection(assert_agrees):
    position = positions(2, 3)
    assert_agrees(
        lambda x: rope(x[:, :, 1:3], position, THETA),
        lambda x: rope_reference(x[:, :, 1:3], position, THETA),
        [torch.randn(2, 3, 5, 4)],
    )


def test_bf16_angles_are_fp32():
    x, position = torch.randn(1, 2, 1, 8).bfloat16(), torch.tensor([[256, 257]])
    out = rope(x, position, THETA)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rope(x.float(), position, THETA).bfloat16())


def test_mistakes_are_named():
    x, position = torch.randn(1, 2, 3, 4), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="even"):
        rope(x[..., :3], position, THETA)
    with pytest.raises(ValueError, match="norm_weight must have 4"):
        rope(x, position, THETA, norm_weight=torch.ones(5))
