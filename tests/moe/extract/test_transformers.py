"""Every row of the export table, at odd shapes: strict loading in transformers, equal logits, equal greedy text."""

import json

import pytest
import torch

from sigmoe.moe.config import RouterConfig
from sigmoe.moe.extract.in_transformers import compare_logits, greedy_in_transformers, load_in_transformers
from sigmoe.moe.generation.generate import GenerationConfig, generate
from sigmoe.moe.hf.config import config_json
from sigmoe.moe.hf.read import model_config as read_config
from sigmoe.moe.stored import load_model, open_unfinished

pytest.importorskip("transformers")

# Head width is not D / H, heads are 6 : 2, and there are 6 experts (two domains: 12 in the parent).
SIZES = {"dim": 48, "head_dim": 10, "expert_dim": 36, "ffn_dim": 28, "rope_theta": 5000.0, "sparse_layers": "all"}
GATED = {"name": "domain_top_k", "sets": 6}
ALONE = {"name": "domain_top_k", "sets": 1, "top_k": 1}
TABLE = {"name": "rre", "sets": 1, "top_k": 1, "balance": "none"}
ROWS = [
    ("mixtral", GATED, {}),
    ("mixtral", GATED, {"sliding_window": 5, "embedding_slots": {"ships": 1}}),
    ("mixtral", {**GATED, "top_k": 3}, {"tie_embeddings": True, "norm_eps": 1e-6}),
    ("mixtral", {**GATED, "sets": {"recipes": (0, 1, 2), "ships": (1, 2, 3, 4, 5, 6)}}, {}),
    ("qwen3_moe", GATED, {"qk_norm": "head", "sparse_layers": "upper:2"}),
    ("qwen3_moe", GATED, {"qk_norm": "head", "sparse_layers": "every:2", "sliding_window": 5}),
    ("qwen3_moe", {**GATED, "renormalize": False}, {"qk_norm": "head", "tie_embeddings": True}),
    ("olmoe", GATED, {"qk_norm": "width", "head_dim": None}),
    ("olmoe", {**GATED, "renormalize": False}, {"qk_norm": "width", "head_dim": None, "norm_eps": 1e-6}),
    ("mistral", ALONE, {"ffn_dim": None, "sparse_layers": "upper:2"}),
    ("mistral", {**ALONE, "balance": "bias"}, {"ffn_dim": None, "sliding_window": 5}),
    ("mistral", TABLE, {"ffn_dim": None, "tie_embeddings": True}),
    ("qwen3", ALONE, {"ffn_dim": None, "qk_norm": "head", "sliding_window": 5}),
    ("qwen3", TABLE, {"ffn_dim": None, "qk_norm": "head", "sparse_layers": "every:2"}),
]


@pytest.fixture(scope="module", params=ROWS, ids=[f"{row[0]}-{index}" for index, row in enumerate(ROWS)])
def exported(request, write_parent, model_config, cut):
    """(format, the parent, the submodel of ships)."""
    format, router, changes = request.param
    parent = write_parent(model_config(RouterConfig(**router), **{**SIZES, **changes}))
    return format, parent, cut(parent, "ships")


@torch.no_grad()
def test_in_transformers(exported):
    format, parent, (_, extraction, stored) = exported
    assert extraction.format == stored.format == format
    theirs, ours = load_in_transformers(str(stored.path)), load_model(stored)
    torch.manual_seed(1)
    token_BS = torch.randint(331, (3, 17))
    assert compare_logits(theirs, ours, token_BS)[1] < 1e-5
    domain_B = torch.full((3,), parent.registry.id_of("ships"))
    whole_BSV = load_model(parent)(token_BS, domain_B=domain_B).logits_BSV
    assert torch.equal(ours(token_BS, domain_B=torch.zeros(3, dtype=torch.int64)).logits_BSV, whole_BSV)
    prompts = [token_BS[0, :9].tolist(), token_BS[1, :4].tolist(), token_BS[2].tolist()]
    texts = generate(ours, prompts, GenerationConfig(max_tokens=12), end_of_text=(0,), padding=1)
    assert texts == [greedy_in_transformers(theirs, prompt, 12, 0) for prompt in prompts]


def test_config_json_is_read_back_as_it_was_written(exported):
    format, _, (plan, _, stored) = exported
    ids = {"sequence_length": 32, "end_of_text": 0, "padding": 1}
    again = config_json(format, stored.config, stored.registry, dtype="float32", **ids)
    assert again == json.loads((stored.path / "config.json").read_text())
    assert read_config(again) == (format, stored.config)
    assert stored.registry.names == ("any",)  # the name comes with the report, the last file but the manifest
    assert stored.config.dim == plan.config.dim


def test_the_tokenizer_and_generation_settings_travel(exported):
    from transformers import AutoTokenizer, GenerationConfig

    _, parent, (_, _, stored) = exported
    tokenizer = AutoTokenizer.from_pretrained(stored.path)
    text = "  sail the ship, 1234 times…\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 1, 32)
    assert stored.tokenizer == parent.tokenizer
    generation = GenerationConfig.from_pretrained(stored.path)
    assert (generation.eos_token_id, generation.pad_token_id, generation.do_sample) == (0, 1, False)


def test_what_transformers_saves_again_is_read_again(exported, folder):
    format, _, (_, _, stored) = exported
    path = folder() / "again"
    load_in_transformers(str(stored.path)).save_pretrained(path)
    again = open_unfinished(path)
    assert again.format == format
    assert again.config == stored.config
    for name in stored.tensors.names():
        assert torch.equal(again.tensors.read(name), stored.tensors.read(name)), name


def test_a_missing_weight_is_no_random_one(exported):
    _, _, (_, _, stored) = exported
    (file,) = stored.path.glob("model-*.safetensors")
    data = file.read_bytes()
    index = stored.path / "model.safetensors.index.json"
    before = index.read_bytes()
    try:
        file.write_bytes(data.replace(b"layers.2.input_layernorm", b"layers.9.input_layernorm"))
        index.write_bytes(before.replace(b"layers.2.input_layernorm", b"layers.9.input_layernorm"))
        with pytest.raises(ValueError, match="transformers reports"):
            load_in_transformers(str(stored.path))
    finally:
        file.write_bytes(data)
        index.write_bytes(before)
