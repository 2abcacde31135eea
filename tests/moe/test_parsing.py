import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.parsing import from_mapping


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int
    rate: float = 0.5

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count must be at least 0, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    text: str = "x"
    flag: bool = False
    maybe: int | None = None
    kind: Literal["one", "two"] = "one"
    level: Literal[1, 2] = 1
    several: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "")
    table: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[Inner, ...] = ()
    choice: int | Mapping[str, int | tuple[int, ...]] | None = None
    anything: Any = None


def test_everything_at_once():
    outer = from_mapping(
        Outer,
        {
            "inner": {"count": 1, "rate": 2},
            "text": "y",
            "flag": True,
            "maybe": 3,
            "kind": "two",
            "level": 2,
            "several": [1, 2],
            "pair": [4, "p"],
            "table": {"a": 1, "b": 0.25},
            "rows": [{"count": 5}, {"count": 6, "rate": 0.0}],
            "choice": {"a": 1, "b": [1, 2]},
            "anything": [None],
        },
    )
    assert outer == Outer(
        inner=Inner(count=1, rate=2.0),
        text="y",
        flag=True,
        maybe=3,
        kind="two",
        level=2,
        several=(1, 2),
        pair=(4, "p"),
        table={"a": 1.0, "b": 0.25},
        rows=(Inner(count=5), Inner(count=6, rate=0.0)),
        choice={"a": 1, "b": (1, 2)},
        anything=[None],
    )
    assert type(outer.inner.rate) is float
    assert type(outer.table["a"]) is float


def test_defaults():
    assert from_mapping(Outer, {"inner": {"count": 1}}) == Outer(inner=Inner(count=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "unknown key colour; known keys: .*flag, inner, "),
        ({"inner": {"count": 1, "speed": 2}}, "unknown key inner.speed; known keys: count, rate"),
        ({"inner": {}}, r"missing key inner.count \(a whole number\)"),
        ({"inner": 3}, "inner must be a group of keys, got 3"),
        ({"inner": {"count": -1}}, "inner: count must be at least 0, got -1"),
        ({"inner": {"count": True}}, "inner.count must be a whole number, got True"),
        ({"inner": {"count": "1"}}, "inner.count must be a whole number, got '1'"),
        ({"inner": {"count": 1.0}}, "inner.count must be a whole number, got 1.0"),
        ({"inner": {"count": None}}, "inner.count must be a whole number, got None"),
        ({"inner": {"count": 1, "rate": "1"}}, "inner.rate must be a number, got '1'"),
        ({"inner": {"count": 1, "rate": True}}, "inner.rate must be a number, got True"),
        ({"inner": {"count": 1, "rate": math.nan}}, "inner.rate must be a number, got nan"),
        ({"inner": {"count": 1, "rate": -math.inf}}, "inner.rate must be a number, got -inf"),
        ({"inner": {"count": 1, "rate": 10**400}}, "inner.rate must be a number, got 10"),
        ({"text": 1}, "text must be text, got 1"),
        ({"flag": 1}, "flag must be true or false, got 1"),
        ({"maybe": "a"}, "maybe must be a whole number, got 'a'"),
        ({"kind": "three"}, "kind must be one of one, two, got 'three'"),
        ({"kind": ["one"]}, "kind must be one of one, two"),
        ({"level": True}, "level must be one of 1, 2, got True"),
        ({"level": 1.0}, "level must be one of 1, 2, got 1.0"),
        ({"several": 1}, "several must be a list of a whole number, got 1"),
        ({"several": "12"}, "several must be a list of a whole number, got '12'"),
        ({"several": [1, "2"]}, r"several\[1\] must be a whole number, got '2'"),
        ({"pair": [1]}, r"pair must be .*, got \[1\]"),
        ({"pair": ["a", "b"]}, r"pair\[0\] must be a whole number"),
        ({"table": [1]}, "table must be a group of names with a number"),
        ({"table": {"a": "b"}}, "table.a must be a number, got 'b'"),
        ({"table": {1: 0.5}}, r"table \(key\) must be text, got 1"),
        ({"rows": [{"count": 1}, {"count": 2, "extra": 0}]}, r"unknown key rows\[1\].extra"),
        ({"choice": "a"}, "choice must be a whole number or a group of names with .* or null, got 'a'"),
        ({"choice": {"a": [1, None]}}, "choice must be a whole number or "),
    ],
)
def test_mistakes_are_named_with_their_path(changes, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(Outer, {"inner": {"count": 1}, **changes})


def test_missing_and_wrong_at_the_top():
    with pytest.raises(ValueError, match=r"^missing key inner \(a group of keys\)"):
        from_mapping(Outer, {})
    with pytest.raises(ValueError, match=r"^config must be a group of keys, got \[\]"):
        from_mapping(Outer, [])
    with pytest.raises(ValueError, match=r"unknown key run\.x"):
        from_mapping(Outer, {"x": 1}, "run")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROUTERS = st.sampled_from(
    [
        {"name": "top_k", "num_experts": 4},
        {"name": "domain_top_k", "sets": 2, "balance": "bias"},
        {"name": "domain_top_k", "sets": {"a": 2, "b": [0, 1], "c": [[0, 1], [2, 3]]}, "capacity_factor": 1},
        {"name": "rre", "sets": 3, "top_k": 1, "balance": "none"},
    ]
)
MODELS = st.fixed_dictionaries(
    {name: st.sampled_from([8, 16]) for name in ("vocab_size", "dim", "num_layers", "num_heads", "expert_dim")}
    | {"num_kv_heads": st.sampled_from([2, 3]), "head_dim": st.sampled_from([4, None])}
)


def disturbed(values, cls):
    """Sound values for `cls`, some replaced by arbitrary JSON, some keys added."""
    wrong = st.dictionaries(st.sampled_from(list(cls.__dataclass_fields__)) | st.text(max_size=4), JSON, max_size=2)
    return st.builds(lambda sound, more: {**sound, **more}, values, wrong)


@settings(max_examples=150, deadline=None)
@given(
    JSON
    | st.builds(
        lambda model, router: {"router": router, **model},
        disturbed(MODELS, ModelConfig),
        disturbed(ROUTERS, RouterConfig),
    )
)
def test_arbitrary_data_gives_a_config_or_a_value_error(data):
    try:
        config = from_mapping(ModelConfig, data)
    except ValueError as error:
        assert str(error)
    else:
        assert isinstance(config, ModelConfig)
        assert isinstance(config.router, RouterConfig)
