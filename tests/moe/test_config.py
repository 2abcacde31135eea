import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmoe.moe.config import ModelConfig, RouterConfig, check_registry, num_experts
from sigmoe.moe.domains import Domain, DomainRegistry
from sigmoe.moe.parsing import from_mapping

TOP_K = RouterConfig(name="top_k", num_experts=4)


def model(**changes):
    shape = {"vocab_size": 31, "dim": 12, "num_layers": 4, "num_heads": 6, "num_kv_heads": 2, "expert_dim": 5}
    return ModelConfig(**{**shape, "router": TOP_K, **changes})


def domain_router(sets, **changes):
    return RouterConfig(name="domain_top_k", sets=sets, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "top_k"}, "top_k needs num_experts of at least 1"),
        ({"name": "top_k", "num_experts": 0}, "top_k needs num_experts of at least 1"),
        ({"name": "top_k", "num_experts": (4, 0)}, "top_k needs num_experts of at least 1"),
        ({"name": "top_k", "num_experts": ()}, "top_k needs num_experts of at least 1"),
        ({"name": "top_k", "num_experts": (4, 1)}, "top_k is 2, but there are 1 experts: lower top_k"),
        ({"name": "top_k", "num_experts": 4, "sets": 2}, "no sets"),
        ({"name": "domain_top_k"}, "domain_top_k needs sets"),
        ({"name": "rre", "sets": 2, "num_experts": 4, "top_k": 1}, "rre needs sets .* no num_experts"),
        ({"name": "domain_top_k", "sets": 0}, "sets must be at least 1, got 0"),
        ({"name": "domain_top_k", "sets": 2, "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"name": "top_k", "num_experts": 1}, "top_k is 2, but there are 1 experts: lower top_k"),
        ({"name": "rre", "sets": 2, "balance": "none"}, "top_k must be 1"),
        ({"name": "rre", "sets": 2, "top_k": 1}, "balance none"),
        ({"name": "rre", "sets": 2, "top_k": 1, "balance": "none", "z_loss": 0.1}, "z_loss 0"),
        ({"name": "rre", "sets": 2, "top_k": 1, "balance": "none", "jitter": 0.1}, "jitter 0"),
        ({"name": "top_k", "num_experts": 4, "capacity_factor": 0.0}, "capacity_factor must be above 0 .* got 0.0"),
        ({"name": "top_k", "num_experts": 4, "jitter": 1.0}, r"jitter must lie in \[0, 1\), got 1.0"),
        ({"name": "top_k", "num_experts": 4, "jitter": -0.1}, r"jitter must lie in \[0, 1\), got -0.1"),
        ({"name": "top_k", "num_experts": 4, "jitter": math.nan}, r"jitter must lie in \[0, 1\), got nan"),
        ({"name": "top_k", "num_experts": 4, "auxiliary_loss": -1.0}, "auxiliary_loss must be at least 0, got -1.0"),
        ({"name": "top_k", "num_experts": 4, "z_loss": -1.0}, "z_loss must be at least 0, got -1.0"),
        ({"name": "top_k", "num_experts": 4, "bias_rate": -1.0}, "bias_rate must be at least 0, got -1.0"),
    ],
)
def test_router_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: 0}, f"{name} must be at least 1, got 0")
            for name in ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "expert_dim")
        ),
        ({"dim": 13}, "dim 13 is not divisible by num_heads 6: change one, or set head_dim"),
        ({"num_kv_heads": 4}, "num_heads 6 is not divisible by num_kv_heads 4"),
        ({"dim": 18}, "head_dim must be even for rotary positions, got 3"),
        ({"head_dim": 0}, "head_dim must be even .* got 0"),
        ({"ffn_dim": 0}, r"ffn_dim must be at least 1 \(or null\), got 0"),
        ({"sliding_window": 0}, r"sliding_window must be at least 1 \(or null\), got 0"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0, got 0.0"),
        ({"rope_theta": -1.0}, "rope_theta must be above 0, got -1.0"),
        ({"init_std": 0.0}, "init_std must be above 0, got 0.0"),
        ({"embedding_slots": {"a": 2}}, r"embedding_slots must use every slot from 0 on, got \[0, 2\]"),
        ({"embedding_slots": {"a": -1}}, r"embedding_slots must use every slot from 0 on, got \[-1, 0\]"),
        *(
            ({"sparse_layers": spec}, f"all, none, every:N or upper:N with N up to 4, got '{spec}'")
            for spec in (
                "",
                "some",
                "every",
                "every:",
                "every:0",
                "every:5",
                "upper:-1",
                "upper:1.5",
                "all:2",
                "lower:2",
            )
        ),
    ],
)
def test_model_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("all", (0, 1, 2, 3)),
        ("none", ()),
        ("every:1", (0, 1, 2, 3)),
        ("every:2", (1, 3)),
        ("every:3", (2,)),
        ("every:4", (3,)),
        ("upper:1", (3,)),
        ("upper:3", (1, 2, 3)),
        ("upper:4", (0, 1, 2, 3)),
    ],
)
def test_sparse_layers(spec, layers):
    assert model(sparse_layers=spec).sparse_layer_ids == layers


def test_derived_widths():
    plain = model(embedding_slots={"a": 1, "b": 1, "c": 2})
    assert (plain.head_width, plain.dense_dim, plain.num_slots) == (2, 5, 3)
    given = model(head_dim=10, ffn_dim=7)
    assert (given.head_width, given.dense_dim, given.num_slots) == (10, 7, 1)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        model().dim = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        TOP_K.top_k = 1


def test_validation_needs_no_memory_for_huge_numbers():
    assert model(num_layers=2**80).num_layers == 2**80


def test_registry_of_a_global_router_gives_every_domain_all_experts():
    registry = model().build_registry(("a", "b"))
    assert registry.names == ("a", "b")
    assert [d.experts for d in registry.domains] == [((0, 1, 2, 3),) * 4] * 2


def test_registry_from_a_number():
    registry = model(router=domain_router(3), sparse_layers="upper:2").build_registry(("a", "b"))
    assert [d.experts for d in registry.domains] == [((0, 1, 2),) * 2, ((3, 4, 5),) * 2]
    assert [num_experts(registry, i) for i in range(2)] == [6, 6]


def test_registry_from_names_hands_out_numbers_above_every_named_id():
    router = domain_router({"c": 2, "a": (0, 1, 2), "b": (2, 3), "d": 3})
    registry = model(router=router, embedding_slots={"b": 1}).build_registry(("a", "b", "c", "d"))
    assert [d.experts[0] for d in registry.domains] == [(0, 1, 2), (2, 3), (4, 5), (6, 7, 8)]
    assert [(d.id, d.slot) for d in registry.domains] == [(0, 0), (1, 1), (2, 0), (3, 0)]
    assert all(d.experts == (d.experts[0],) * 4 for d in registry.domains)


def test_registry_with_ids_for_each_layer():
    router = domain_router({"a": ((0, 1), (0, 2)), "b": ((1, 2, 3), (1, 2))})
    registry = model(router=router, sparse_layers="every:2").build_registry(("a", "b"))
    assert registry.sets(0) == ((0, 1), (1, 2, 3))
    assert registry.sets(1) == ((0, 2), (1, 2))
    assert [num_experts(registry, i) for i in range(2)] == [4, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": domain_router({"a": 2, "b": 2, "c": 2})}, "unknown domain 'c'; known domains: a, b"),
        ({"router": domain_router(2), "embedding_slots": {"c": 1}}, "unknown domain 'c'; known domains: a, b"),
        ({"router": domain_router({"a": 2})}, "no experts given for domain 'b': add it to router.sets"),
        ({"router": domain_router({"a": 2, "b": 1})}, "top_k is 2, but domain 'b' has 1 expert.* in layer 0: lower"),
        ({"router": domain_router({"a": (0, 1), "b": (3, 4)})}, "layer 0: expert 2 belongs to no domain"),
        ({"router": domain_router({"a": 2, "b": 0})}, "'b' has no experts in sparse layer 0: give it at least one"),
        ({"router": domain_router({"a": 2, "b": ()})}, "'b' has no experts in sparse layer 0"),
        ({"router": domain_router({"a": 2, "b": (1, 0)})}, r"'b', .* ids must ascend from 0 on, got \[1, 0\]"),
        ({"router": domain_router({"a": 2, "b": (0, 0)})}, "must ascend from 0 on"),
        ({"router": domain_router({"a": 2, "b": (-1, 0)})}, "must ascend from 0 on"),
        ({"router": domain_router({"a": 2, "b": ((0, 1),) * 3})}, "'b' has expert sets for 3 of 4 sparse layers"),
    ],
)
def test_registry_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes).build_registry(("a", "b"))


def test_registry_names_must_differ_and_be_there():
    with pytest.raises(ValueError, match="at least one domain"):
        model().build_registry(())
    with pytest.raises(ValueError, match=r"names must differ, got \['a', 'a'\]"):
        model().build_registry(("a", "a"))


def registry_of(*experts, slots=(0, 0)):
    return DomainRegistry(
        domains=tuple(Domain(name="ab"[i], id=i, slot=slots[i], experts=layers) for i, layers in enumerate(experts))
    )


@pytest.mark.parametrize(
    ("config", "registry", "message"),
    [
        (model(), registry_of(((0, 1, 2),) * 4), "num_experts is 4, but the registry has 3 experts in layer 0"),
        (model(sparse_layers="none"), registry_of(((0, 1),)), "'a' has expert sets for 1 of 0 sparse layers"),
        (
            model(router=domain_router(2)),
            registry_of(((0, 1),) * 4, ((2, 3),) * 4, slots=(0, 1)),
            "'b' uses embedding slot 1 of 1",
        ),
    ],
)
def test_foreign_registry_is_refused(config, registry, message):
    with pytest.raises(ValueError, match=message):
        check_registry(config, registry)


def test_registry_ids_are_positions_and_names_are_looked_up():
    registry = registry_of(((0,),), ((1,),))
    assert (registry.id_of("a"), registry.id_of("b")) == (0, 1)
    with pytest.raises(ValueError, match="unknown domain 'z'; known domains: a, b"):
        registry.id_of("z")
    with pytest.raises(ValueError, match="'a' has id 1, its position is 0"):
        DomainRegistry(domains=(Domain(name="a", id=1, slot=0, experts=()),))


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=4),
        st.one_of(st.integers(2, 5), st.sets(st.integers(0, 9), min_size=2).map(lambda ids: tuple(sorted(ids)))),
        min_size=1,
        max_size=4,
    )
)
def test_registry_survives_json(sets):
    names = tuple(sets)
    try:
        registry = model(router=domain_router(sets)).build_registry(names)
    except ValueError as error:
        assert "belongs to no domain" in str(error)
        return
    again = DomainRegistry.from_json(json.loads(json.dumps(registry.to_json())))
    assert again == registry


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"domains": 3},
        {"domains": "ab"},
        {"domains": [{}]},
        {"domains": [{"name": "a", "id": 0, "slot": 0}]},
        {"domains": [{"name": "a", "id": 0.5, "slot": 0, "experts": []}]},
        {"domains": [{"name": "a", "id": 0, "slot": math.inf, "experts": []}]},
        {"domains": [{"name": "a", "id": 0, "slot": 0, "experts": [["1"]]}]},
        {"domains": [{"name": "a", "id": 0, "slot": 0, "experts": [], "more": 1}]},
    ],
)
def test_what_is_no_registry_is_refused(data):
    with pytest.raises(ValueError, match="not a domain registry: "):
        DomainRegistry.from_json(data)


@pytest.mark.parametrize(
    "config",
    [
        model(),
        model(router=domain_router({"a": ((0, 1), (0, 2)), "b": (1, 2), "c": 3}), embedding_slots={"b": 1}),
        model(router=RouterConfig(name="rre", sets=1, top_k=1, balance="none"), head_dim=10, qk_norm="width"),
    ],
)
def test_config_survives_json(config):
    assert from_mapping(ModelConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_one_renormalised_expert_of_several_would_teach_the_gate_nothing():
    config = model(router=RouterConfig(name="top_k", num_experts=4, top_k=1))
    with pytest.raises(ValueError, match=r"set router\.renormalize=false"):
        config.build_registry(("a",))
    model(router=RouterConfig(name="top_k", num_experts=4, top_k=1, renormalize=False)).build_registry(("a",))
    model(router=RouterConfig(name="top_k", num_experts=1, top_k=1)).build_registry(("a",))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": domain_router({"a": (0, 3_000_000_000), "b": 2})}, "layer 0: expert 1 belongs to no domain"),
        ({"router": domain_router({"a": 10**30, "b": 2})}, f"4 layers with {10**30} expert.* are too many"),
        ({"router": domain_router(3_000_000_000)}, "4 layers with 3000000000 expert.* are too many"),
        ({"router": RouterConfig(name="top_k", num_experts=2**18 + 1)}, "4 layers with 262145 expert.* are too many"),
        ({"num_layers": 10**30}, f"{10**30} layers with 4 expert.* are too many"),
        ({"num_layers": 10**9, "sparse_layers": "none"}, "1000000000 layers with 4 expert.* are too many"),
    ],
)
def test_huge_models_are_refused_before_they_fill_the_memory(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes).build_registry(("a", "b"))


def test_the_largest_model_has_a_registry():
    registry = model(router=RouterConfig(name="top_k", num_experts=2**18)).build_registry(("a",))
    assert num_experts(registry, 3) == 2**18


def test_layers_may_have_different_numbers_of_experts():
    router = RouterConfig(name="top_k", num_experts=(3, 5))
    shape = {"vocab_size": 32, "dim": 8, "num_heads": 2, "num_kv_heads": 1, "expert_dim": 8}
    config = ModelConfig(**shape, num_layers=3, sparse_layers="upper:2", router=router)
    registry = config.build_registry(("a", "b"))
    assert [registry.sets(index) for index in range(2)] == [((0, 1, 2),) * 2, ((0, 1, 2, 3, 4),) * 2]
    with pytest.raises(ValueError, match="num_experts lists 2 layers, but there are 3 sparse ones"):
        ModelConfig(**shape, num_layers=3, router=router)
    other = dataclasses.replace(config, router=RouterConfig(name="top_k", num_experts=(3, 4)))
    with pytest.raises(ValueError, match="num_experts is 4, but the registry has 5 experts in layer 2"):
        check_registry(other, registry)
