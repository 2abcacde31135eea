"""Opens an exported model in transformers and compares it with ours: strict loading, logits, a greedy continuation.

Shape letters: B sequences, S positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..generation.generate import GenerationConfig, generate
from ..model import Transformer
from ..stored import StoredModel, load_model

_PROMPT = 16  # tokens that a greedy continuation begins with


@dataclass(frozen=True, kw_only=True)
class TransformersCheck:
    """What transformers made of the model. `max_relative_difference` is max |theirs - ours| / max |ours|."""

    version: str
    architecture: str
    tokens: int
    max_abs_difference: float
    max_relative_difference: float
    greedy_tokens: int
    greedy_equal: bool


def check_in_transformers(
    stored: StoredModel, token_BS: Tensor, *, new_tokens: int, end_of_text: int, padding: int
) -> TransformersCheck:
    """Load `stored`, a model of one domain, in both and compare logits on `token_BS`, and a greedy continuation."""
    theirs, ours = load_in_transformers(str(stored.path)), load_model(stored)
    absolute, relative = compare_logits(theirs, ours, token_BS)
    prompt_S = token_BS[0, :_PROMPT].tolist()
    settings = GenerationConfig(max_tokens=new_tokens)
    (greedy,) = generate(ours, [prompt_S], settings, end_of_text=(end_of_text,), padding=padding)
    return TransformersCheck(
        version=version("transformers"),
        architecture=type(theirs).__name__,
        tokens=token_BS.numel(),
        max_abs_difference=absolute,
        max_relative_difference=relative,
        greedy_tokens=len(greedy),
        greedy_equal=greedy == greedy_in_transformers(theirs, prompt_S, new_tokens, end_of_text),
    )


def load_in_transformers(path: str) -> Any:
    """Load the directory as AutoModelForCausalLM in fp32; ValueError where a weight is missing, foreign or misshapen.

    transformers alone would draw a missing weight at random and go on.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ValueError("transformers is not installed: pip install 'sigmoe[hf]', or transformers=false") from error
    disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    for kind, keys in info.items():
        if keys:
            raise ValueError(f"{path}: transformers reports {kind}: {sorted(map(str, keys))[0]}")
    return model.eval()


@torch.no_grad()
def compare_logits(theirs: Any, ours: Transformer, token_BS: Tensor) -> tuple[float, float]:
    """Return max |theirs - ours| and the same over max |ours|, of the logits of `token_BS`, a document a sequence."""
    ours_BSV = ours(token_BS, domain_B=torch.zeros(token_BS.shape[0], dtype=torch.int64)).logits_BSV
    assert ours_BSV is not None
    difference = float((theirs(input_ids=token_BS).logits - ours_BSV).abs().max())
    return difference, difference / float(ours_BSV.abs().max())


@torch.no_grad()
def greedy_in_transformers(theirs: Any, prompt_S: Sequence[int], new_tokens: int, end_of_text: int) -> list[int]:
    """Return at the most `new_tokens` tokens that transformers' own generate adds, greedily, up to the end of text."""
    token_BS = torch.tensor([list(prompt_S)])
    mask_BS = torch.ones_like(token_BS)
    out_BS = theirs.generate(token_BS, attention_mask=mask_BS, max_new_tokens=new_tokens, do_sample=False)
    added = out_BS[0, token_BS.shape[1] :].tolist()
    end = added.index(end_of_text) if end_of_text in added else len(added)
    return [int(token) for token in added[:end]]
