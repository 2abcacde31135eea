"""SwiGLU experts for inference: grouping, products and weighted sum in one, without autograd.

Made for the few tokens of a decoding step, which Python groups faster than a tensor operation starts. An expert's
arithmetic sees its own rows and weights and nothing else, and sums run in expert order, so a submodel with fewer
experts computes the same bits.

Shape letters: T tokens, K top-k, R routed pairs (T*K) in expert order, D model width, F expert hidden width, G = 2F
(gate rows, then up rows), E experts.
"""

from collections.abc import Sequence
from itertools import groupby

import torch

from ..linear import linear_forward
from ..swiglu import swiglu_forward

Weights = torch.Tensor | Sequence[torch.Tensor]


def routed_mlp(
    x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, gate_up_EGD: Weights, down_EDF: Weights
) -> torch.Tensor:
    """`sum_k weight_TK[t, k] * down (silu(gate x_TD[t]) * up x_TD[t])` by expert expert_TK[t, k]: [T, D], x's dtype.

    gate_up_EGD [E, 2F, D] and down_EDF [E, D, F], stacked or one by one (then perhaps `packed`), of x's float dtype;
    expert_TK int64 in 0..E-1; weight_TK fp32.
    """
    T, K = expert_TK.shape
    expert_R = expert_TK.flatten().tolist()
    order_R = sorted(range(T * K), key=expert_R.__getitem__)
    pair_R, token_R = torch.tensor([order_R, [pair // K for pair in order_R]], device=x_TD.device).unbind()
    rows_RD = x_TD.index_select(0, token_R)
    spans, begin = [], 0
    for expert, pairs in groupby(order_R, key=expert_R.__getitem__):
        end = begin + len(list(pairs))
        spans.append((expert, slice(begin, end)))
        begin = end
    act_RF = swiglu_forward(torch.cat([linear_forward(rows_RD[rows], gate_up_EGD[e]) for e, rows in spans]))
    out_RD = torch.cat([linear_forward(act_RF[rows], down_EDF[e]) for e, rows in spans])
    # The sum is fp32, in expert order.
    weight_R = weight_TK.reshape(-1).index_select(0, pair_R)
    if T == 1:
        return (weight_R[None] @ out_RD.to(weight_R.dtype)).to(x_TD.dtype)
    weighted_RD = out_RD * weight_R[:, None]
    out_TD = torch.zeros(x_TD.shape, dtype=weighted_RD.dtype, device=x_TD.device)
    return out_TD.index_add_(0, token_R, weighted_RD).to(x_TD.dtype)
