"""What travels with a model of transformers': files byte for byte, config.json but for what changed."""

import dataclasses

import pytest

from sigmoe.moe.hf.carry import carried_config, carried_files
from sigmoe.moe.hf.read import model_config

PARENT = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 31,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 8,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "router_aux_loss_coef": 0.001,
    "rope_theta": 5000.0,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0",
    "made_by": "somebody",
}


def carried(parent, experts=6, **options):
    _, config = model_config(parent)
    router = dataclasses.replace(config.router, num_experts=experts)
    smaller = dataclasses.replace(config, router=router)
    return carried_config(parent, parent["model_type"], smaller, smaller.build_registry(("a", "b")), **options)


def test_what_did_not_change_stays_and_in_order():
    assert list(carried(PARENT).items()) == list(PARENT.items())


def test_fewer_experts_are_all_that_changes():
    assert carried(PARENT, 4) == PARENT | {"num_local_experts": 4}


def test_the_number_of_experts_keeps_the_name_that_the_parent_gave_it():
    parent = {"num_experts" if key == "num_local_experts" else key: value for key, value in PARENT.items()}
    assert carried(parent, 4) == parent | {"num_experts": 4}
    both = PARENT | {"num_experts": 6}
    assert carried(both, 4) == both | {"num_local_experts": 4, "num_experts": 4}


@pytest.mark.parametrize("names", [("torch_dtype",), ("dtype",), ("torch_dtype", "dtype")])
def test_a_new_dtype_keeps_its_name(names):
    parent = {key: value for key, value in PARENT.items() if key != "torch_dtype"} | dict.fromkeys(names, "float32")
    assert carried(parent, dtype="bfloat16") == parent | dict.fromkeys(names, "bfloat16")


def test_another_format_is_refused():
    _, config = model_config(PARENT)
    with pytest.raises(ValueError, match=r"config\.json of a mixtral says little of a olmoe"):
        carried_config(PARENT, "olmoe", config, config.build_registry(("a",)))


def test_only_what_travels_is_found(tmp_path):
    travels = ["tokenizer.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja", "LICENSE"]
    stays = ["README.md", "model.safetensors", "pytorch_model.bin", "config.json", "modeling_own.py"]
    for name in (*travels, *stays):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = carried_files(tmp_path)
    assert sorted(found) == sorted(travels)
    assert all(path.read_text() == name for name, path in found.items())
