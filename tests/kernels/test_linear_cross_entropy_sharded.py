"""The head's rows with several holders, here threads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import reduce

import pytest
import torch

from sigmoe.kernels.linear_cross_entropy import linear_cross_entropy, op

V, D, T = 29, 12, 23


class Holders:
    """Reductions over threads, in the order of the holders."""

    def __init__(self, count):
        self.barrier, self.given = threading.Barrier(count, timeout=20), [None] * count

    def reduce(self, holder, x, combine):
        self.given[holder] = x
        self.barrier.wait()
        result = reduce(combine, self.given)
        self.barrier.wait()
        return result


class Shard:
    def __init__(self, holders, holder, first, num_columns):
        self.holders, self.holder, self.first, self.num_columns = holders, holder, first, num_columns

    def maximum(self, x_N):
        return self.holders.reduce(self.holder, x_N, torch.maximum)

    def total(self, x_N):
        return self.holders.reduce(self.holder, x_N, torch.add)


@pytest.mark.parametrize("chunk", [64, 2])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("ends", [[29], [10, 29], [8, 16, 24, 29]])
def test_holders_together_equal_one(ends, z_loss, chunk, monkeypatch):
    monkeypatch.setattr(op, "chunk_size", lambda V, D, device: chunk)
    torch.manual_seed(0)
    x_TD, weight_VD = torch.randn(T, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    label_T = torch.randint(V, (T,))
    label_T[::5] = -100
    first_x, first_weight = x_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    loss_sum, loss_T = linear_cross_entropy(first_x, first_weight, label_T, z_loss=z_loss)
    (loss_sum * 0.7).backward()
    begins, holders = [0, *ends[:-1]], Holders(len(ends))
    widest = max(end - begin for begin, end in zip(begins, ends))

    def run(holder):
        x, weight = x_TD.clone().requires_grad_(), weight_VD[begins[holder] : ends[holder]].clone().requires_grad_()
        shard = Shard(holders, holder, begins[holder], widest)
        found_sum, found_T = linear_cross_entropy(x, weight, label_T, z_loss=z_loss, shard=shard)
        (found_sum * 0.7).backward()
        return found_sum.detach(), found_T, x.grad, weight.grad

    with ThreadPoolExecutor(len(ends)) as pool:
        results = list(pool.map(run, range(len(ends))))
    for found_sum, found_T, _, _ in results:
        torch.testing.assert_close(found_sum, loss_sum.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found_T, loss_T, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sum(result[2] for result in results), first_x.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(torch.cat([result[3] for result in results]), first_weight.grad, rtol=1e-10, atol=1e-13)
