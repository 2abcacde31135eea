"""SwiGLU experts over a few tokens, without autograd: routing, products and weighted sum in one.

Tokens are grouped in Python, where a few dozen pairs sort faster than a tensor operation starts. An expert's arithmetic
sees its own rows and weights and nothing else, and sums run in expert order, so a submodel with fewer experts computes
the same bits.

Shape letters: T tokens, K top-k, R routed pairs (T*K) in expert order, D model width, F expert hidden width, G = 2F
(gate rows, then up rows), E experts.
"""

from itertools import groupby

import torch

from ..linear import linear_few
from ..swiglu.op import swiglu_forward


def expert_mlp_few(
    x_TD: torch.Tensor,
    expert_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """`sum_k weight_TK[t, k] * expert_mlp(x_TD[t], expert_TK[t, k])`, [T, D] in x's dtype.

    x_TD, gate_up_EGD [E, 2F, D] and down_EDF [E, D, F] of one float dtype; expert_TK int64 in 0..E-1; weight_TK fp32.
    """
    T, K = expert_TK.shape
    expert_R = expert_TK.flatten().tolist()
    order_R = sorted(range(T * K), key=expert_R.__getitem__)
    pair_R = torch.tensor(order_R, device=x_TD.device)
    token_R = pair_R // K
    rows_RD = x_TD.index_select(0, token_R)
    spans, begin = [], 0
    for expert, pairs in groupby(order_R, key=expert_R.__getitem__):
        end = begin + len(list(pairs))
        spans.append((expert, slice(begin, end)))
        begin = end
    hidden_RG = torch.cat([linear_few(rows_RD[rows], gate_up_EGD[e]) for e, rows in spans])
    act_RF = swiglu_forward(hidden_RG)
    out_RD = torch.cat([linear_few(act_RF[rows], down_EDF[e]) for e, rows in spans])
    # A weighted sum in fp32, in expert order.
    weighted_RD = out_RD * weight_TK.reshape(-1)[pair_R, None]
    out_TD = torch.zeros(x_TD.shape, dtype=weighted_RD.dtype, device=x_TD.device)
    return out_TD.index_add_(0, token_R, weighted_RD).to(x_TD.dtype)
