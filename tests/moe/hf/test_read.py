"""What config.json of a transformers model may say, and what is refused by name."""

import pytest

from sigmoe.moe.hf.read import model_config

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 8}
MOE = {**SIZES, "model_type": "qwen3_moe", "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}


@pytest.mark.parametrize(
    ("changes", "layers"), [({}, "all"), ({"mlp_only_layers": None}, "all"), ({"mlp_only_layers": [1, 0]}, "upper:2")]
)
def test_dense_layers_are_listed(changes, layers):
    assert model_config({**MOE, **changes})[1].sparse_layers == layers


def test_layers_of_one_kind():
    changes = {**WINDOW, "layer_types": ["sliding_attention"] * 4}
    assert model_config({**MOE, **changes})[1].sliding_window == 5
    with pytest.raises(ValueError, match="its layers differ in their attention window"):
        model_config({**MOE, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]})


@pytest.mark.parametrize("value", [3, 0, "a", [[]], [None], {}, [True]], ids=str)
def test_what_is_no_list_is_named(value):
    with pytest.raises(ValueError, match="mlp_only_layers must be a list of whole numbers, got"):
        model_config({**MOE, "mlp_only_layers": value})
    with pytest.raises(ValueError, match="layer_types must be a list of texts, got"):
        model_config({**MOE, **WINDOW, "layer_types": value})
