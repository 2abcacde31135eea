"""No layout changes the result: every tensor, gradient, loss and count of a step against one process."""

import os

import pytest
import torch
from cases import cases

from sigmoe.kernels.backend import TORCH

EVERYTHING = os.environ.get("SIGMOE_PARITY") == "all"
ALL = [pytest.param(case, id=case.name) for world in (2, 4) for case in cases(world, EVERYTHING)]
pytestmark = pytest.mark.timeout(1600 if EVERYTHING else 300)


def assembled(results, kind, name):
    """Put a canonical tensor together from the ranks that are its pieces' first holders; every holder agrees."""
    whole = seen = None
    for answer, tensors in results:
        if name not in answer["places"] or f"{kind}.{name}" not in tensors:
            continue
        dim, start, stop, shape, first = answer["places"][name]
        piece = tensors[f"{kind}.{name}"]
        if whole is None:
            whole, seen = torch.zeros(shape, dtype=piece.dtype), torch.zeros(shape, dtype=torch.int32)
        if first:
            place = (slice(None),) * (dim or 0) + ((slice(start, stop),) if dim is not None else ())
            whole[place] = piece
            seen[place] += 1
    assert whole is not None, name
    assert bool((seen == 1).all()), f"{name}: every element has one first holder"
    for answer, tensors in results:
        if name in answer["places"] and f"{kind}.{name}" in tensors:
            dim, start, stop, _, _ = answer["places"][name]
            expected = whole if dim is None else whole.narrow(dim, start, stop - start)
            assert torch.equal(tensors[f"{kind}.{name}"], expected), f"{name}: holders differ"
    return whole


@pytest.mark.parametrize("case", ALL)
def test_a_step_equals_one_process(case, results, single):
    one, ranks = single(case), results(case)
    assert one.margin[0] > 1e-4
    for name, value in one.values.items():
        assert torch.equal(assembled(ranks, "value", name), value), name
    worst = {name: error(assembled(ranks, "gradient", name), one.gradients[name]) for name in one.gradients}
    bound = 1e-6 if case.backends == TORCH else 3e-6  # the one process's kernels are torch's, which sum otherwise
    assert {name: value for name, value in worst.items() if value > bound} == {}
    assert max(answer["padding"] for answer, _ in ranks) == 0
    once = [answer for answer, _ in ranks if answer["counts_once"]]
    for key, value in one.sums.items():
        assert sum(answer["sums"][key] for answer in once) == pytest.approx(value, rel=1e-6, abs=1e-9), key
    for layer, count in one.counts.items():
        assert [sum(counts) for counts in zip(*(answer["counts"][layer] for answer in once))] == count


@pytest.mark.parametrize("case", ALL)
def test_logits_are_gathered(case, results, single):
    one = single(case)
    for answer, tensors in results(case):
        rows = one.batch.rows(answer["begin"], answer["begin"] + case.micro)
        with torch.no_grad():
            expected = one.model(rows.token_BS, start_BS=rows.start_BS, domain_B=rows.domain_B).logits_BSV
        assert error(tensors["logits"], expected) < 1e-6


def error(ours, theirs):
    """Norm-relative distance; where the truth is zero, the distance itself."""
    scale = float(theirs.double().norm())
    return float((ours.double() - theirs.double()).norm()) / (scale if scale > 0 else 1.0)
