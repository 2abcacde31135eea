"""From logits to the next token: greedy, temperature, top-k, top-p; every draw keyed, so it has no state.

Shape letters: B sequences, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..keyed import keyed_uniform, seed_of


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen. Temperature 0 is greedy; top_k first, then top_p of what it leaves."""

    temperature: float = 0.0
    top_k: int | None = None  # only the k likeliest tokens; None: all
    top_p: float | None = None  # only the likeliest tokens that hold this share of the probability; None: all
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0 (0: greedy), got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (or null), got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] (or be null), got {self.top_p}")


def next_tokens(logits_BV: Tensor, config: SamplingConfig, row_B: Tensor, position: int) -> Tensor:
    """Return the next token of every sequence, int64 `[B]`.

    A draw depends on the logits, the seed, the sequence's number `row_B` and the token's number `position` alone, not
    on what else is in the batch. Ties go to the lower id.
    """
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    prob_BV, token_BV = kept_probabilities(logits_BV, config)
    # Two draws make 48 bits: 24 of them could not reach every token of a large vocabulary.
    draw_B2 = keyed_uniform(seed_of("sample", config.seed, position), row_B, 2).double()
    share_B = draw_B2[:, 0] + draw_B2[:, 1] * 2.0**-24
    below_BV = prob_BV.cumsum(-1)
    place_B1 = torch.searchsorted(below_BV, (share_B * below_BV[:, -1])[:, None], right=True)
    # A share that rounds up to the whole sum would lie behind the last token that has a chance.
    last_B1 = below_BV.shape[1] - 1 - (prob_BV > 0).flip(-1).int().argmax(-1, keepdim=True)
    place_B1 = torch.minimum(place_B1, last_B1)
    return (place_B1 if token_BV is None else token_BV.gather(-1, place_B1))[:, 0]


def kept_probabilities(logits_BV: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """Return fp64 probabilities, 0 for what top-k and top-p leave out; not normalised again.

    With either of them sorted, the likeliest first, and beside them the tokens' ids.
    """
    prob_BV = torch.softmax(logits_BV.double() / config.temperature, -1)
    if config.top_k is None and config.top_p is None:
        return prob_BV, None
    prob_BV, token_BV = prob_BV.sort(dim=-1, descending=True, stable=True)
    if config.top_k is not None:
        prob_BV[:, config.top_k :] = 0
    if config.top_p is not None:
        before_BV = prob_BV.cumsum(-1) - prob_BV
        prob_BV = prob_BV.where(before_BV < config.top_p * prob_BV.sum(-1, keepdim=True), 0)
    return prob_BV, token_BV
