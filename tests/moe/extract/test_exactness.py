"""A submodel on disk gives its parent's logits, all bits equal, and holds the parent's very bytes."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.extract import formula_bytes
from sigmoe.moe.stored import load_model

NAMES = ("a", "b", "c")
SETS = {
    "disjoint": {"a": 3, "b": 2, "c": 5},
    "overlapping": {"a": (0, 1, 2), "b": (1, 3), "c": (0, 2, 3, 4)},
    "by layer": {"a": ((0, 1, 2), (1, 4)), "b": ((2, 3), (0, 1, 2, 3)), "c": ((1, 3, 4), (0, 4))},
}
SLOTS = [{}, {"embedding_slots": {"a": 1, "c": 2}}, {"embedding_slots": {"b": 1}, "tie_embeddings": True}]
SHAPES = [(1, 1), (1, 7), (2, 33), (5, 3), (3, 13)]
DTYPES = {None: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float16}


@torch.no_grad()
def assert_bits_equal(parent, child, names, shape, dtype=torch.float32):
    """Compare on a batch of each domain of `names`; `child` has ids of its own for them."""
    batch, length = shape
    token_BS = torch.randint(parent.config.vocab_size, shape, generator=torch.Generator().manual_seed(length))
    start_BS = torch.zeros(shape, dtype=torch.int64)
    start_BS[:, length // 2 :] = length // 2
    for name in names:
        # What transformers reads knows no domains before extraction.json stands beside it.
        new = child.registry.names.index(name) if name in child.registry.names else 0
        old = torch.full((batch,), parent.registry.id_of(name))
        whole = parent(token_BS, start_BS=start_BS, domain_B=old)
        alone = child(token_BS, start_BS=start_BS, domain_B=torch.full((batch,), new))
        assert whole.logits_BSV.dtype == dtype
        assert torch.equal(whole.logits_BSV, alone.logits_BSV)
        assert whole.logits_BSV.isfinite().all()


def tensors_of(stored):
    """Every tensor by its name on disk, read by the safetensors library alone."""
    tensors = {}
    for path in stored.path.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return tensors


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def assert_bytes_kept(parent, cut, dtype):
    """Each tensor is the parent's, whole or its rows, rounded to `dtype` where it is a parameter."""
    source, written, kept = tensors_of(parent), tensors_of(cut.stored), cut.extraction.kept
    assert sorted(tensor.name for tensor in kept) == sorted(written)
    for tensor in kept:
        expected = source[tensor.source]
        expected = expected if tensor.rows is None else expected[list(tensor.rows)]
        if dtype is not None and tensor.name.endswith(".weight"):
            expected = expected.to(dtype)
        assert written[tensor.name].dtype == expected.dtype
        assert sha256(written[tensor.name]) == tensor.sha256 == sha256(expected)
    size = sum(tensor.nbytes for tensor in written.values())
    assert size == cut.extraction.num_bytes == formula_bytes(cut.plan, dtype or torch.float32)


def expert_sets(draw, names, num_sparse):
    """Sets by number, or by ids that may overlap, one list for all layers or one a layer."""
    if draw(st.booleans()) or not num_sparse:
        return {name: draw(st.integers(1, 5)) for name in names}
    layers = []
    for _ in range(num_sparse if draw(st.booleans()) else 1):
        picked = [draw(st.sets(st.integers(0, 6), min_size=1, max_size=5)) for _ in names]
        used = sorted(set.union(*picked))  # without gaps
        layers.append([tuple(sorted(used.index(expert) for expert in chosen)) for chosen in picked])
    return {name: tuple(layer[i] for layer in layers) for i, name in enumerate(names)}


def router(draw, sets, num_sparse):
    if draw(st.booleans()):
        return RouterConfig(name="rre", sets=sets, top_k=1, balance="none")
    sizes = [len(layer) for given in sets.values() if not isinstance(given, int) for layer in given]
    sizes += [given for given in sets.values() if isinstance(given, int)]
    top_k = draw(st.integers(1, min(3, *sizes, *sizes)))
    renormalize = draw(st.booleans()) and (top_k > 1 or max(sizes) == 1)
    balance = draw(st.sampled_from(["none", "loss", "bias"]))
    return RouterConfig(name="domain_top_k", sets=sets, top_k=top_k, renormalize=renormalize, balance=balance)


@st.composite
def cases(draw):
    """A parent's config and domains, those to cut out, what to round to, and the shape of a batch."""
    names = NAMES[: draw(st.integers(1, 3))]
    layers, width = draw(st.integers(1, 4)), draw(st.sampled_from([(22, 6, 19), (16, None, 12)]))
    sparse = draw(
        st.sampled_from(["all", "none", f"upper:{layers}", "upper:1", "every:1", f"every:{(layers + 1) // 2}"])
    )
    shape = {"vocab_size": 331, "dim": width[0], "num_layers": layers, "head_dim": width[1], "expert_dim": width[2]}
    shape |= {"num_heads": 4, "num_kv_heads": 2, "sparse_layers": sparse, "init_std": 0.3}
    plain = RouterConfig(name="top_k", num_experts=1, top_k=1)
    num_sparse = len(ModelConfig(**shape, router=plain).sparse_layer_ids)
    slots = {name: draw(st.integers(0, 2)) for name in names}
    used = sorted({0, *slots.values()})
    config = ModelConfig(
        **shape,
        ffn_dim=draw(st.sampled_from([None, width[2], 18])),
        qk_norm=draw(st.sampled_from(["none", "head", "width"])),
        sliding_window=draw(st.sampled_from([None, 4])),
        tie_embeddings=draw(st.booleans()),
        embedding_slots=draw(st.sampled_from([None, {name: used.index(slot) for name, slot in slots.items()}])),
        router=router(draw, expert_sets(draw, names, num_sparse), num_sparse),
    )
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    return config, names, chosen, draw(st.sampled_from(list(DTYPES))), draw(st.sampled_from(SHAPES))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(case=cases(), sigmoe_format=st.booleans())
def test_any_domains_of_any_model(write_parent, cut, case, sigmoe_format):
    config, names, chosen, dtype, shape = case
    parent = write_parent(config, names)
    made = cut(parent, *chosen, dtype=dtype, sigmoe_format=sigmoe_format)
    whole, alone = (load_model(stored, dtype=DTYPES[dtype]).float() for stored in (parent, made.stored))
    assert_bits_equal(whole, alone, [name for name in names if name in chosen], shape)
    assert_bytes_kept(parent, made, dtype)


@pytest.mark.parametrize("changes", SLOTS, ids=["no slots", "slots", "slots tied"])
@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
@pytest.mark.parametrize("name", ["domain_top_k", "rre"])
def test_the_routers_over_every_kind_of_sets(model_config, write_parent, cut, name, sets, changes):
    gate = {"top_k": 1, "balance": "none"} if name == "rre" else {}
    parent = write_parent(model_config(RouterConfig(name=name, sets=sets, **gate), **changes), NAMES)
    whole = load_model(parent)
    for domain in NAMES:
        alone = load_model(cut(parent, domain).stored)
        for shape in SHAPES:
            assert_bits_equal(whole, alone, [domain], shape)


def test_in_bf16_arithmetic(model_config, write_parent, cut):
    parent = write_parent(model_config(RouterConfig(name="domain_top_k", sets=SETS["disjoint"])), NAMES)
    whole = load_model(parent, dtype=torch.bfloat16)
    for domain in NAMES:
        alone = load_model(cut(parent, domain, dtype=torch.bfloat16).stored, dtype=torch.bfloat16)
        assert_bits_equal(whole, alone, [domain], (2, 9), torch.bfloat16)
