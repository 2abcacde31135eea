"""What verification finds, when one number of a written submodel is wrong; rounding; bytes."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sigmoe.moe.config import RouterConfig
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.extract import formula_bytes, verify_domain, verify_tensors
from sigmoe.moe.stored import open_model, open_unfinished

LEARNED = RouterConfig(name="domain_top_k", sets={"recipes": 3, "ships": 2}, balance="bias")
TABLE = RouterConfig(name="rre", sets={"recipes": (0, 1, 2), "ships": (1, 3)}, top_k=1, balance="none")
MOE = "model.layers.2.block_sparse_moe"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def texts(dataset):
    return open_dataset(dataset)


@pytest.fixture
def change(write_parent, cut, model_config):
    """Cut recipes out, change its tensors with `edit`; returns the parent and the Cut, opened again."""

    def call(router, edit, **options):
        parent = write_parent(model_config(router))
        made = cut(parent, "recipes", **options)
        (path,) = made.stored.path.rglob("*.safetensors")
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        edit(tensors)
        save_file(tensors, path)
        return parent, made._replace(stored=open_unfinished(made.stored.path))

    return call


def difference(parent, cut, texts, **options):
    check = verify_domain(parent, cut.stored, texts, "recipes", max_tokens=300, **options)
    assert (check.domain, check.tokens) == ("recipes", 300)
    return check.max_abs_difference


def set_row(name, row, value):
    def edit(tensors):
        tensors[f"{MOE}.{name}"][row] = value

    return edit


def swap(*names):
    def edit(tensors):
        first, second = (f"{MOE}.{name}" for name in names)
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return edit


def swap_rows(tensors):
    name = f"{MOE}.gate.weight"
    tensors[name] = tensors[name][[1, 0, 2]]


def other_experts(tensors):
    """The table's commonest entries of a layer, moved on by one."""
    name = f"{MOE}.gate.route_table"
    tensors[name] = (tensors[name] + 1) % 3


FAULTS = {
    "a number of an expert": (LEARNED, set_row("experts.1.w2.weight", (0, 0), 0.5)),
    "experts in another order": (LEARNED, swap("experts.0.w1.weight", "experts.1.w1.weight")),
    "gate rows in another order": (LEARNED, swap_rows),
    "a wrong selection bias": (LEARNED, set_row("gate.e_score_correction_bias", 0, 9.0)),
    "a wrong row of the table": (TABLE, other_experts),
}


@pytest.mark.parametrize(("router", "edit"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_number_is_found(change, texts, router, edit):
    parent, wrong = change(router, edit)
    assert 0 < difference(parent, wrong, texts) < float("inf")
    with pytest.raises(ValueError, match=r"block_sparse_moe.* does not read back as it was written"):
        verify_tensors(wrong.stored, wrong.extraction)


def test_nan_is_never_equal(change, texts):
    def edit(tensors):
        tensors["model.norm.weight"][3] = float("nan")

    parent, wrong = change(LEARNED, edit)
    assert difference(parent, wrong, texts) == float("inf")
    assert difference(wrong.stored, wrong, texts) == float("inf")


@pytest.mark.parametrize("router", [LEARNED, TABLE], ids=["learned", "table"])
def test_what_is_right_is_equal(change, texts, router):
    parent, right = change(router, lambda tensors: None)
    verify_tensors(right.stored, right.extraction)
    assert difference(parent, right, texts) == 0


@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_one_flipped_bit_is_found(write_parent, cut, model_config, place):
    made = cut(write_parent(model_config(LEARNED)), "ships")
    (path,) = made.stored.path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int(place * (len(data) - header))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="does not read back as it was written"):
        verify_tensors(made.stored, made.extraction)


@pytest.mark.parametrize("router", [LEARNED, TABLE], ids=["learned", "table"])
@pytest.mark.parametrize("name", DTYPES)
def test_rounded_parameters_equal_the_rounded_parent(change, texts, router, name):
    dtype = DTYPES[name]
    parent, made = change(router, lambda tensors: None, dtype=dtype)
    assert difference(parent, made, texts, rounding=dtype) == 0
    assert difference(parent, made, texts) > 0
    kept = {"e_score_correction_bias": torch.float32, "route_table": torch.int32}
    held = {n: made.stored.tensors.dtype(n) for n in made.stored.tensors.names()}
    assert {n: d for n, d in held.items() if d != dtype} == {
        n: kept[n.rpartition(".")[2]] for n in held if not n.endswith("weight")
    }
    assert made.extraction.num_bytes == formula_bytes(made.plan, dtype)


def test_selection_biases_are_not_rounded(change, texts):
    """They decide by differences that bf16, in steps of 2 at this size, does not hold."""

    def edit(tensors):
        for name, tensor in tensors.items():
            if name.endswith("bias"):
                tensor.copy_(300 + torch.arange(len(tensor)) / 2)

    parent, made = change(LEARNED, edit, dtype=torch.bfloat16)
    (path,) = (parent.path / "model").glob("*.safetensors")
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            layer = int(name.split(".")[2])
            experts = parent.registry.domains[0].experts[parent.config.sparse_layer_ids.index(layer)]
            tensor[list(experts)] = 300 + torch.arange(len(experts)) / 2
    save_file(tensors, path)
    assert difference(open_model(parent.path), made, texts, rounding=torch.bfloat16) == 0


def test_config_json_names_the_dtype(write_parent, cut, model_config):
    router = RouterConfig(name="domain_top_k", sets=2)
    parent = write_parent(model_config(router, sparse_layers="all"))
    for name, dtype in {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}.items():
        made = cut(parent, "ships", dtype=dtype)
        assert made.extraction.format == "mixtral"
        assert json.loads((made.stored.path / "config.json").read_text())["dtype"] == name


def test_what_fp16_cannot_hold_is_refused(change, cut, model_config):
    def edit(tensors):
        tensors["lm_head.weight"][0, 0] = 70_000.0

    _, parent = change(LEARNED, edit)
    with pytest.raises(ValueError, match=r"lm_head.weight holds numbers beyond the range of fp16: choose dtype=bf16"):
        cut(parent.stored, "recipes", dtype=torch.float16)
    assert cut(parent.stored, "recipes", dtype=torch.bfloat16).extraction.dtype == torch.bfloat16


@pytest.mark.parametrize("router", ["domain_top_k", "rre"])
def test_files_are_no_larger_than_the_formula_says(write_parent, cut, model_config, router):
    """Headers included, at a width where they are small beside the weights as in any real model."""
    gate = {"top_k": 1, "balance": "none"} if router == "rre" else {}
    width = {"dim": 256, "expert_dim": 512, "ffn_dim": 512, "num_heads": 8, "head_dim": 32, "vocab_size": 1024}
    parent = write_parent(model_config(RouterConfig(name=router, sets=3, **gate), **width))
    for dtype in (None, torch.bfloat16):
        made = cut(parent, "recipes", dtype=dtype)
        size = sum(path.stat().st_size for path in made.stored.path.rglob("*.safetensors"))
        formula = formula_bytes(made.plan, dtype or torch.float32)
        assert formula < size <= 1.001 * formula


def test_sets_of_one_with_a_bias_beside_wider_dense_layers(write_parent, cut, model_config, texts):
    """No model of transformers has the bias, though it chooses among one."""
    router = RouterConfig(name="domain_top_k", sets=1, top_k=1, balance="bias")
    parent = write_parent(model_config(router, qk_norm="head"))
    made = cut(parent, "recipes")
    assert (made.extraction.format, made.stored.format) == ("sigmoe", "sigmoe")
    assert difference(parent, made, texts) == 0
