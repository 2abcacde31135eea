"""Criteria that need no data, and what is refused."""

import pytest
import torch

from sigmoe.moe.prune.criteria import (
    CRITERIA,
    DATA_CRITERIA,
    check_enumerable,
    random_saliency,
    saliency,
    subset_errors,
    weight_saliency,
)
from sigmoe.moe.prune.sums import LayerSums

ZERO = torch.zeros(9, dtype=torch.float64)
UNUSED = LayerSums(
    tokens=5,
    count_E=ZERO.long(),
    gate_E=ZERO,
    norm_E=ZERO,
    gate_norm_E=ZERO,
    easy_ep_E=ZERO,
    prob_EE=ZERO.outer(ZERO),
    subset_error=None,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_weight_is_rms_over_mean_of_all_three_matrices(hf_model, name, dtype):
    theirs, model = hf_model(name, dtype)
    sparse = [block.mlp.experts for block in theirs.model.layers if hasattr(block.mlp, "experts")]
    for ours_E, experts in zip(weight_saliency(model), sparse, strict=True):
        for ours, gate_up_GD, down_DF in zip(ours_E, experts.gate_up_proj, experts.down_proj, strict=True):
            weights = torch.cat([gate_up_GD.flatten(), down_DF.flatten()]).detach().double()
            expected = weights.square().mean().sqrt() / weights.abs().mean()
            assert abs(float(ours / expected) - 1) < 1e-12
            assert ours > 1


def test_weight_tells_how_far_it_is(hf_model):
    heard = []
    _, model = hf_model("olmoe")
    weight_saliency(model, progress=lambda done, total: heard.append((done, total)))
    size = sum(model.tensors.num_bytes(name) for name in model.tensors.names() if ".experts." in name)
    assert heard[-1] == (size, size) and heard == sorted(heard)


def test_workers_rate_a_share_each(hf_model, in_threads):
    _, model = hf_model("olmoe")
    alone = weight_saliency(model)
    for values in in_threads(2, lambda workers: weight_saliency(model, workers)):
        assert all(torch.equal(ours_E, theirs_E) for ours_E, theirs_E in zip(values, alone, strict=True))


def test_random_is_keyed():
    one, again, other = (random_saliency([4, 7], seed) for seed in (1, 1, 2))
    assert [len(value_E) for value_E in one] == [4, 7]
    for a, b, c in zip(one, again, other):
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(one[0], one[1][:4])


@pytest.mark.parametrize("criterion", sorted(set(DATA_CRITERIA) - {"reconstruction"}))
def test_an_expert_without_tokens_has_none(criterion):
    assert torch.equal(saliency([UNUSED], criterion)[0], ZERO)


def test_what_is_refused():
    assert set(DATA_CRITERIA) < set(CRITERIA)
    with pytest.raises(ValueError, match="criterion 'weight' is none of those that need data"):
        saliency([UNUSED], "weight")
    with pytest.raises(ValueError, match="of which there may be 8; this model has 9"):
        saliency([UNUSED], "reconstruction")
    with pytest.raises(ValueError, match="there may be 8; this model has 12"):
        check_enumerable([8, 12])
    check_enumerable([8, 8])
    few = LayerSums(**{**vars(UNUSED), "count_E": UNUSED.count_E[:8]})
    with pytest.raises(ValueError, match="calibrate again with criterion=reconstruction"):
        subset_errors(few)
