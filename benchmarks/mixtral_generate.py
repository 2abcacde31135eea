"""The peer: transformers' generate on its Mixtral, with one of its implementations of the experts.

Imported by the worker that measures this peer alone: it imports transformers.

Shape letters: B sequences, S positions.
"""

from collections.abc import Callable

import torch
from transformers import MixtralForCausalLM

from .generate_run import GenerateShape, Texts


def mixtral_run(shape: GenerateShape, implementation: str) -> Callable[[], Texts]:
    """Return a function to the new tokens; `implementation` of the experts: eager, grouped_mm or another it has."""
    model, info = MixtralForCausalLM.from_pretrained(
        shape.folder, dtype=torch.float32, experts_implementation=implementation, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise ValueError(f"transformers does not load the weights: {problem} {info[problem]}")
    model.eval()
    # No end-of-text: every text has the same length.
    model.generation_config.eos_token_id = None
    prompts = shape.prompts()
    width = max(map(len, prompts))
    token_BS = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask_BS = (token_BS > 0).long()

    def run() -> Texts:
        with torch.inference_mode():
            out_BS = model.generate(
                token_BS, attention_mask=mask_BS, max_new_tokens=shape.new_tokens, do_sample=False, pad_token_id=0
            )
        texts: Texts = out_BS[:, width:].tolist()
        return texts

    return run
