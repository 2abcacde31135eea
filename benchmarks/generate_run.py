"""One greedy generation of each contender: the same weights from the same files, the same prompts.

Shape letters: B sequences, S positions.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..moe.generation.generate import GenerationConfig, generate
from ..moe.stored import load_model, open_model

Texts = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class GenerateShape:
    """What one run computes: prompts of evenly spread lengths, so many new tokens each, no end-of-text."""

    folder: str  # of the weights, as transformers reads them
    batch: int
    shortest: int  # prompt
    longest: int
    new_tokens: int

    def prompts(self) -> Texts:
        """Return random prompts, the same in every process; id 0 is left to padding."""
        vocab_size = open_model(Path(self.folder)).config.vocab_size
        generator = torch.Generator().manual_seed(0)
        lengths = torch.linspace(self.shortest, self.longest, self.batch).round().int().tolist()
        return [torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def build_run(contender: str, shape: GenerateShape) -> Callable[[], Texts]:
    """Return a function to the new tokens; `contender` is sigmoe or a Mixtral of transformers."""
    if contender == "sigmoe":
        return _sigmoe_run(shape)
    run: Callable[[], Texts] = importlib.import_module("..mixtral_generate", __name__).mixtral_run(shape, contender)
    return run


def _sigmoe_run(shape: GenerateShape) -> Callable[[], Texts]:
    model, prompts = load_model(open_model(Path(shape.folder))), shape.prompts()
    model.pack()
    config = GenerationConfig(max_tokens=shape.new_tokens, batch=shape.batch)
    return lambda: generate(model, prompts, config, domain_ids=[0] * shape.batch)
