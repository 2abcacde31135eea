"""The plan of a submodel: names, renumbering, rows, slots, the dense form, mistakes."""

import pytest

from sigmoe.moe.canonical import expected_shapes
from sigmoe.moe.config import RouterConfig
from sigmoe.moe.domains import Domain, DomainRegistry
from sigmoe.moe.extract import Piece, plan_submodel

LEARNED = {"name": "domain_top_k", "top_k": 1, "renormalize": False}
TABLE = {"name": "rre", "top_k": 1, "balance": "none"}
GATE = "model.layers.{}.block_sparse_moe.gate.{}"
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
# Layer 1: a {0, 2}, b {1, 2}, c {3}. Layer 2: a {1}, b {0, 3}, c {2, 3}.
SETS = {"a": ((0, 2), (1,)), "b": ((1, 2), (0, 3)), "c": ((3,), (2, 3))}


@pytest.fixture
def plan(model_config):
    """Plan the submodel of `domains` of a model with domains a, b, c; returns parent's config, registry, and it."""

    def call(router, *domains, names=("a", "b", "c"), **changes):
        config = model_config(RouterConfig(**router), **changes)
        registry = config.build_registry(names)
        return config, registry, plan_submodel(config, registry, domains)

    return call


def sets_of(submodel):
    return {domain.name: domain.experts for domain in submodel.registry.domains}


@pytest.mark.parametrize("router", [LEARNED, TABLE], ids=["learned", "table"])
@pytest.mark.parametrize("domains", ["a", "bc", "abc"])
@pytest.mark.parametrize("changes", [{}, {"embedding_slots": {"a": 1, "c": 2}}, {"tie_embeddings": True}])
def test_every_tensor_has_an_origin_of_its_shape(plan, router, domains, changes):
    config, registry, submodel = plan({**router, "sets": SETS}, *domains, **changes)
    parent, shapes = expected_shapes(config, registry), expected_shapes(submodel.config, submodel.registry)
    assert set(submodel.pieces) == set(shapes)
    for name, piece in submodel.pieces.items():
        source = parent[piece.source]
        assert shapes[name] == (source if piece.rows is None else (len(piece.rows), *source[1:]))
    sources = [piece.source for piece in submodel.pieces.values()]
    assert len(set(sources)) == len(sources)


def test_all_domains_are_the_whole_model(plan):
    config, registry, submodel = plan({**LEARNED, "sets": SETS}, "c", "a", "b")
    assert submodel.registry == registry
    assert set(submodel.pieces) == set(expected_shapes(config, registry))
    assert all(piece.source == name for name, piece in submodel.pieces.items())


def test_experts_are_renumbered_without_gaps(plan):
    _, _, submodel = plan({**LEARNED, "sets": SETS}, "b")
    assert sets_of(submodel) == {"b": ((0, 1), (0, 1))}
    origins = {(layer, new): submodel.pieces[EXPERT.format(layer, new)] for layer in (1, 2) for new in (0, 1)}
    assert origins == {
        (1, 0): Piece(source=EXPERT.format(1, 1)),
        (1, 1): Piece(source=EXPERT.format(1, 2)),
        (2, 0): Piece(source=EXPERT.format(2, 0)),
        (2, 1): Piece(source=EXPERT.format(2, 3)),
    }
    assert submodel.pieces[GATE.format(1, "weight")].rows == (1, 2)
    assert submodel.pieces[GATE.format(2, "weight")].rows == (0, 3)


def test_a_selection_bias_goes_with_its_gate(plan):
    _, _, submodel = plan({**LEARNED, "sets": SETS, "balance": "bias"}, "b")
    name = GATE.format(2, "e_score_correction_bias")
    assert submodel.pieces[name] == Piece(source=name, rows=(0, 3))


def test_several_domains_share_their_experts_and_keep_their_order(plan):
    _, _, submodel = plan({**LEARNED, "sets": SETS}, "c", "a")
    assert submodel.registry.names == ("a", "c")
    # Kept of layer 1: experts 0, 2, 3; of layer 2: 1, 2, 3.
    assert sets_of(submodel) == {"a": ((0, 1), (0,)), "c": ((2,), (1, 2))}
    assert submodel.pieces[EXPERT.format(1, 1)].source == EXPERT.format(1, 2)
    assert submodel.pieces[GATE.format(1, "weight")].rows == (0, 2, 3)


@pytest.mark.parametrize(("domains", "rows"), [("b", (1,)), ("ac", (0, 2))])
def test_a_table_keeps_its_domains_rows(plan, domains, rows):
    _, _, submodel = plan({**TABLE, "sets": SETS}, *domains)
    for layer in (1, 2):
        assert submodel.pieces[GATE.format(layer, "route_table")].rows == rows


def test_slots_are_kept_by_use(plan):
    router = {**LEARNED, "sets": SETS}
    slots = {"embedding_slots": {"b": 2, "c": 1}}
    _, _, alone = plan(router, "c", **slots)
    for part in ("model.embed_tokens", "lm_head"):
        assert alone.pieces[f"{part}.weight"] == Piece(source=f"{part}.slots.1.weight")
    assert alone.config.embedding_slots is None
    _, _, both = plan(router, "b", "a", **slots)
    assert both.config.embedding_slots == {"a": 0, "b": 1}
    assert both.pieces["model.embed_tokens.slots.1.weight"] == Piece(source="model.embed_tokens.slots.2.weight")
    _, _, shared = plan(router, "b", "c", embedding_slots={"b": 1, "c": 1})
    assert shared.pieces["lm_head.weight"] == Piece(source="lm_head.slots.1.weight")
    assert shared.config.num_slots == 1


@pytest.mark.parametrize("router", [{**LEARNED, "balance": "bias"}, TABLE], ids=["learned", "table"])
@pytest.mark.parametrize("changes", [{"ffn_dim": None}, {"sparse_layers": "all"}], ids=["as wide", "no dense layer"])
def test_a_set_of_one_becomes_dense(plan, router, changes):
    _, _, submodel = plan({**router, "sets": 1}, "b", **changes)
    assert (submodel.config.sparse_layers, submodel.config.dense_dim) == ("none", 19)
    assert sets_of(submodel) == {"b": ()}
    assert set(submodel.pieces) == set(expected_shapes(submodel.config, submodel.registry))
    assert submodel.pieces["model.layers.2.mlp.up_proj.weight"].source == EXPERT.format(2, 1).replace("w1", "w3")
    assert not [name for name in submodel.pieces if "gate." in name]


@pytest.mark.parametrize(
    ("domains", "changes"), [("ab", {"ffn_dim": None}), ("b", {}), ("c", {"ffn_dim": None})], ids=str
)
def test_what_cannot_be_dense_stays_sparse(plan, domains, changes):
    """Two domains; dense layers of another width; one expert in some layers alone."""
    sets = SETS if domains == "c" else 1
    _, _, submodel = plan({**LEARNED, "sets": sets}, *domains, **changes)
    assert submodel.config.sparse_layers == "upper:2"


def test_a_submodel_of_a_submodel_is_the_submodel(plan):
    _, _, direct = plan({**LEARNED, "sets": SETS}, "c", embedding_slots={"c": 1})
    _, _, two = plan({**LEARNED, "sets": SETS}, "a", "c", embedding_slots={"c": 1})
    again = plan_submodel(two.config, two.registry, ["c"])
    assert (again.config, again.registry) == (direct.config, direct.registry)

    def composed(piece):
        first = two.pieces[piece.source]
        if piece.rows is None or first.rows is None:
            return Piece(source=first.source, rows=piece.rows or first.rows)
        return Piece(source=first.source, rows=tuple(first.rows[row] for row in piece.rows))

    assert {name: composed(piece) for name, piece in again.pieces.items()} == direct.pieces


@pytest.mark.parametrize(
    ("domains", "words"),
    [
        (["d"], "unknown domain 'd'; known domains: a, b, c"),
        (["a", "b", "a"], "name each domain once, got a, b, a"),
        ([], "name each domain once, got none"),
    ],
)
def test_mistakes_are_named(plan, domains, words):
    with pytest.raises(ValueError, match=words):
        plan({**LEARNED, "sets": SETS}, *domains)


def test_a_gate_over_all_experts_cannot_be_cut(plan):
    router = {"name": "top_k", "num_experts": 4}
    with pytest.raises(ValueError, match="its router is top_k, one gate over the experts of all domains"):
        plan(router, "a")
    config, _, whole = plan(router, "a", names=("a",))  # of one domain it is the whole
    assert whole.config == config
    with pytest.raises(ValueError, match="unknown domain 'b'; known domains: a"):
        plan(router, "b", names=("a",))


def test_a_dense_model_gives_any_of_its_domains(plan):
    _, _, submodel = plan({"name": "top_k", "num_experts": 1, "top_k": 1}, "b", sparse_layers="none")
    assert submodel.registry == DomainRegistry(domains=(Domain(name="b", id=0, slot=0, experts=()),))
    assert all(piece == Piece(source=name) for name, piece in submodel.pieces.items())
