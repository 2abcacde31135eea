"""What config.json of a transformers model may say, and what is refused by name."""

import inspect
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from sigmoe.moe.hf import read
from sigmoe.moe.hf.formats import READ_FORMATS
from sigmoe.moe.hf.read import model_config

HAS_TRANSFORMERS = find_spec("transformers") is not None

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 8,
}
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


# Nothing that changes what a model computes outside training.
HARMLESS = {
    "attention_dropout",
    "max_position_embeddings",
    "output_router_logits",
    "pad_token_id",
    "router_jitter_noise",
    "use_cache",
}


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs transformers")
@pytest.mark.parametrize("format", READ_FORMATS)
def test_every_key_that_transformers_computes_with_is_read_or_refused(format):
    folder = Path(find_spec("transformers").origin).parent / "models" / format
    source = (folder / f"modeling_{format}.py").read_text()
    used = set(re.findall(r"config\.([a-z]\w+)\b(?!\()", source)) | set(re.findall(r'config, "([a-z]\w+)"', source))
    assert {"hidden_size", "num_attention_heads", "rms_norm_eps"} <= used
    known = set(re.findall(r'"(\w+)"', inspect.getsource(read)))
    assert used - known - HARMLESS == set()


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs transformers")
@pytest.mark.parametrize("format", READ_FORMATS)
def test_missing_keys_mean_what_transformers_takes_them_for(format):
    from transformers import AutoConfig

    sizes = {**SIZES, "num_attention_heads": 32, "hidden_size": 64}
    del sizes["num_key_value_heads"]
    if format == "qwen3_moe":
        sizes["moe_intermediate_size"] = 8
    whole = AutoConfig.for_model(format, **sizes).to_dict()
    (_, ours), (_, theirs) = model_config({**sizes, "model_type": format}), model_config(whole)
    assert ours.head_width == theirs.head_width
    assert replace(ours, head_dim=None) == replace(theirs, head_dim=None)


def test_the_number_of_experts_goes_by_two_names():
    other = {"num_local_experts" if key == "num_experts" else key: value for key, value in MOE.items()}
    assert model_config(other) == model_config(MOE)


def test_transformers_4_and_5_write_the_angle_differently():
    older = model_config({**MOE, "rope_theta": 5000.0, "rope_scaling": None})
    newer = model_config({**MOE, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}})
    assert older == newer
    assert older[1].rope_theta == 5000.0
