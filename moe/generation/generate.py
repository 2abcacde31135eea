"""The loop: prompts in, tokens out, a batch at a time over a cache of keys and values.

Shape letters: B sequences, S positions, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import KeyValueCache
from ..model import Transformer
from .sampling import SamplingConfig, next_tokens

OnToken = Callable[[int, int], None]
_RESERVED = 4096  # positions of the cache behind the prompt, at the most, until they are needed


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(SamplingConfig):
    """How tokens are chosen, and how many."""

    max_tokens: int = 100
    batch: int = 8  # prompts that are continued together

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    domain_ids: Sequence[int] | None = None,
    end_of_text: Collection[int] = (),
    padding: int = 0,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Return the tokens that follow each prompt, at most `max_tokens`, without the end-of-text that stopped it.

    Args:
        model: for inference, with its weights.
        prompts: token ids, at least one a prompt.
        config: how tokens are chosen, and how many.
        domain_ids: each prompt's domain; needed by domain routers and embedding slots.
        end_of_text: ids that end a text.
        padding: any id of the vocabulary; it stands before the shorter prompts of a batch, out of sight.
        on_token: hears (prompt, token) as tokens come.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, or a model that needs domains and got none.
    """
    check_prompts(model, prompts)
    texts: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(prompts), config.batch):
        rows = range(first, min(first + config.batch, len(prompts)))
        domains = None if domain_ids is None else torch.tensor([domain_ids[row] for row in rows])
        batch = _Batch(model, [prompts[row] for row in rows], list(rows), domains, padding, config)
        for position in range(config.max_tokens):
            ended = []
            for place, token in enumerate(batch.next_tokens(position)):
                row = batch.rows[place]
                if token in end_of_text:
                    ended.append(place)
                    continue
                texts[row].append(token)
                if on_token is not None:
                    on_token(row, token)
            batch.drop(ended)
            if not batch.rows:
                break
    return texts


def check_prompts(model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for a prompt that is empty or has ids that the model does not know."""
    vocab_size = model.config.vocab_size
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number + 1} is empty: give it at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompt {number + 1} has a token outside the model's vocabulary of {vocab_size}")


class _Batch:
    """The texts of a batch that go on, and what the next step needs of them."""

    def __init__(
        self,
        model: Transformer,
        prompts: list[Sequence[int]],
        rows: list[int],
        domain_B: Tensor | None,
        padding: int,
        config: GenerationConfig,
    ) -> None:
        parameter = next(model.parameters())
        self.model, self.rows, self.config, self.device = model, rows, config, parameter.device
        self.domain_B = domain_B
        self.row_B = torch.tensor(rows, device=self.device)
        token_BS, self.start_BS = left_padded(prompts, padding)
        self.token_BS = token_BS.to(self.device)
        capacity = token_BS.shape[1] + min(config.max_tokens, _RESERVED)
        self.cache = KeyValueCache(
            model.config, batch=len(rows), capacity=capacity, device=self.device, dtype=parameter.dtype
        )

    def next_tokens(self, position: int) -> list[int]:
        """Run the model on what it has not seen yet, and choose each text's next token."""
        start_BS = self.start_BS.to(self.device) if position == 0 else None
        logits_BV = self.model.extend(self.token_BS, self.cache, start_BS=start_BS, domain_B=self.domain_B)
        token_B = next_tokens(logits_BV, self.config, self.row_B, position)
        self.token_BS = token_B[:, None]
        chosen: list[int] = token_B.tolist()
        return chosen

    def drop(self, ended: list[int]) -> None:
        """Go on without the texts at these places."""
        if not ended:
            return
        kept = [place for place in range(len(self.rows)) if place not in ended]
        self.rows = [self.rows[place] for place in kept]
        if not kept:
            return
        kept_B = torch.tensor(kept, device=self.device)
        self.token_BS, self.row_B = self.token_BS[kept_B], self.row_B[kept_B]
        self.domain_B = None if self.domain_B is None else self.domain_B[kept_B.to(self.domain_B.device)]
        self.cache.keep(kept_B)


def left_padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Return tokens and document starts `[B, S]`: prompts end together, what stands before the shorter is unseen."""
    width = max(map(len, prompts))
    token_BS = torch.full((len(prompts), width), padding)
    for row, prompt in enumerate(prompts):
        token_BS[row, width - len(prompt) :] = torch.as_tensor(prompt)
    start_B1 = torch.tensor([[width - len(prompt)] for prompt in prompts])
    return token_BS, start_B1.where(torch.arange(width) >= start_B1, 0)
