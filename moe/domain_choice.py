"""Which domain a text belongs to, by the model's own account: the one under which its tokens are likeliest.

Shape letters: P prompts, N domains, R rows of a batch (a prompt under a domain each), S positions.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .batch import IGNORED
from .model import Transformer

_MOST_TOKENS = 1 << 13  # of one forward pass, padding included, unless a single row is longer

Prompts = Sequence[Sequence[int]]


@torch.no_grad()
def domain_scores(model: Transformer, prompts: Prompts) -> Tensor:
    """Return the mean log-probability of each prompt's tokens under each of the model's domains, fp32 `[P, N]`.

    In nats a token, over all tokens but the first, which nothing predicts: a prompt of one token scores 0 everywhere.
    Prompts may differ in length; their scores do not depend on each other. ValueError for a prompt without tokens.
    """
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} has no tokens, so it cannot choose a domain: give domain=")
    device = next(model.parameters()).device
    score_PN = torch.zeros(len(prompts), len(model.registry.domains))
    for prompt_R, domain_R in _chunks(prompts, score_PN.shape[1]):
        token_RS, label_RS = _padded([prompts[prompt] for prompt in prompt_R])
        output = model(
            token_RS.to(device), domain_B=torch.tensor(domain_R, device=device), label_BS=label_RS.to(device)
        )
        assert output.loss_BS is not None
        labels_R = (label_RS != IGNORED).sum(1).clamp(min=1)
        score_PN[prompt_R, domain_R] = -output.loss_BS.double().sum(1).cpu().div(labels_R).float()
    return score_PN


def choose_domains(model: Transformer, prompts: Prompts) -> list[int]:
    """Return the id of the domain under which each prompt is likeliest; ties go to the lower id."""
    chosen: list[int] = domain_scores(model, prompts).argmax(1).tolist()
    return chosen


def _chunks(prompts: Prompts, num_domains: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the prompts and domains of the rows of each forward pass, shorter prompts first: little padding."""
    prompt_R: list[int] = []
    domain_R: list[int] = []
    for prompt in sorted(range(len(prompts)), key=lambda number: len(prompts[number])):
        for domain in range(num_domains):
            # Prompts come in the order of their lengths, so the batch is as wide as its last row.
            if prompt_R and (len(prompt_R) + 1) * len(prompts[prompt]) > _MOST_TOKENS:
                yield prompt_R, domain_R
                prompt_R, domain_R = [], []
            prompt_R.append(prompt)
            domain_R.append(domain)
    if prompt_R:
        yield prompt_R, domain_R


def _padded(rows: Prompts) -> tuple[Tensor, Tensor]:
    """Return tokens and labels `[R, S]`; zeros and IGNORED after the end of the shorter rows."""
    size = max(len(row) for row in rows)
    token_RS = torch.zeros(len(rows), size, dtype=torch.int64)
    label_RS = torch.full((len(rows), size), IGNORED)
    for number, row in enumerate(rows):
        token_RS[number, : len(row)] = torch.as_tensor(row)
        label_RS[number, : len(row) - 1] = token_RS[number, 1 : len(row)]
    return token_RS, label_RS
