"""Tiny Mixtral, Qwen3-MoE and OLMoE with random weights, as transformers writes them, and text for them."""

import json

import pytest
import torch

from sigmoe.moe.stored import open_model

SHAPE = {
    "vocab_size": 331,
    "hidden_size": 26,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
MODELS = {
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 19}),
    "mixtral tied": (
        "Mixtral",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "intermediate_size": 17,
            "sliding_window": 9,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 13,
            "intermediate_size": 21,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "olmoe": (
        "Olmoe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "intermediate_size": 15,
            "hidden_size": 30,
            "num_key_value_heads": 3,
            "norm_topk_prob": False,
        },
    ),
}


@pytest.fixture(scope="session")
def hf_model(dataset, tmp_path_factory):
    """Make one of MODELS; returns it in memory, and as it lies on disk, with the dataset's tokenizer."""
    transformers = pytest.importorskip("transformers")

    def make(name, dtype=torch.float32):
        architecture, changes = MODELS[name]
        config = getattr(transformers, f"{architecture}Config")(**{**SHAPE, **changes})
        torch.manual_seed(len(name))
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.25)
        path = tmp_path_factory.mktemp("hf") / "model"
        model.to(dtype).save_pretrained(path)
        (path / "tokenizer.json").write_bytes((dataset / "tokenizer.json").read_bytes())
        return model, open_model(path)

    return make


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory):
    """A file of rows of three domains, and some without."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"text": f"{number} " + "stir the butter, hoist the sail " * (1 + number % 4), "domain": domain}
        for number in range(24)
        for domain in ("recipes", "ships", "law")
    ]
    rows += [{"text": "a row of no domain"}, {"text": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
