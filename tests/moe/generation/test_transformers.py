"""Greedy texts are those of transformers' generate, from the same files."""

import pytest
import torch

from sigmoe.moe.generation.generate import GenerationConfig, generate
from sigmoe.moe.stored import load_model, open_model

mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Mixtral of odd shape, and the folder it is saved in."""
    config = mixtral.MixtralConfig(
        vocab_size=331,
        hidden_size=48,
        intermediate_size=36,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        experts_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = mixtral.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("mixtral")
    theirs.save_pretrained(folder)
    return theirs, folder


def test_identical_greedy_texts(saved):
    theirs, folder = saved
    torch.manual_seed(1)
    prompts = [torch.randint(1, 331, (length,)).tolist() for length in (13, 5, 1, 29)]
    width, steps = max(map(len, prompts)), 24
    token_BS = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    out_BS = theirs.generate(
        token_BS, attention_mask=(token_BS > 0).long(), max_new_tokens=steps, min_new_tokens=steps, do_sample=False
    )
    ours = load_model(open_model(folder))
    for _ in ("plain", "packed"):
        texts = generate(ours, prompts, GenerationConfig(max_tokens=steps), domain_ids=[0] * 4)
        assert texts == out_BS[:, width:].tolist()
        ours.pack()
    assert len({token for text in texts for token in text}) > 20
