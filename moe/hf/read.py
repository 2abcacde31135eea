"""config.json of a transformers model -> our config; what would change the arithmetic and we lack is refused."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from ..config import ModelConfig, RouterConfig
from .formats import HF_FORMATS, HFFormat

ItemT = TypeVar("ItemT", int, str)
_MISSING = object()
# What must stand in config.json as given here, or not at all.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "clip_qkv": None,
    "rope_scaling": None,
    "mlp_bias": False,
}


def model_config(data: Mapping[str, Any]) -> tuple[HFFormat, ModelConfig]:
    """Return the format that config.json names and our config of the same model, as one domain.

    Raises ValueError naming the key that is missing, of a wrong type, or asks for what sigmoe lacks.
    """
    format = data.get("model_type")
    if format not in HF_FORMATS:
        raise ValueError(f"model_type is {format!r}; sigmoe reads {', '.join(HF_FORMATS)}")
    for key, value in _FIXED.items():
        if data.get(key, value) != value:
            raise ValueError(f"{key} is {data[key]!r}; sigmoe reads models with {value!r} alone")
    dim, heads = _whole(data, "hidden_size"), _whole(data, "num_attention_heads")
    sparse = format in ("mixtral", "qwen3_moe", "olmoe")
    config = ModelConfig(
        vocab_size=_whole(data, "vocab_size"),
        dim=dim,
        num_layers=_whole(data, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_whole(data, "num_key_value_heads", heads),
        head_dim=None if format == "olmoe" else _optional(data, "head_dim"),
        expert_dim=_whole(data, "moe_intermediate_size" if format == "qwen3_moe" else "intermediate_size"),
        ffn_dim=_whole(data, "intermediate_size"),
        sparse_layers=_sparse_layers(data) if sparse else "none",
        qk_norm={"qwen3_moe": "head", "qwen3": "head", "olmoe": "width"}.get(format, "none"),  # type: ignore[arg-type]
        rope_theta=_rope_theta(data, format),
        norm_eps=_number(data, "rms_norm_eps", {"olmoe": 1e-5, "mixtral": 1e-5}.get(format, 1e-6)),
        sliding_window=_window(data, format),
        tie_embeddings=_flag(data, "tie_word_embeddings", False),
        init_std=_number(data, "initializer_range", 0.02),
        router=_router(data, format) if sparse else RouterConfig(name="top_k", num_experts=1, top_k=1),
    )
    return cast(HFFormat, format), config


def _router(data: Mapping[str, Any], format: str) -> RouterConfig:
    # transformers calls the number of experts differently from version to version.
    key = "num_local_experts" if "num_local_experts" in data else "num_experts"
    top_k = _whole(data, "num_experts_per_tok")
    return RouterConfig(
        name="top_k",
        num_experts=_whole(data, key),
        top_k=top_k,
        renormalize=True if format == "mixtral" else _flag(data, "norm_topk_prob", False),
        auxiliary_loss=_number(data, "router_aux_loss_coef", 0.001) * top_k,
    )


def _sparse_layers(data: Mapping[str, Any]) -> str:
    """The spec of ModelConfig for Qwen3-MoE's decoder_sparse_step and mlp_only_layers."""
    num_layers, step = _whole(data, "num_hidden_layers"), _whole(data, "decoder_sparse_step", 1)
    dense = _list(data, "mlp_only_layers", int)
    sparse = [i for i in range(num_layers) if i not in dense and (i + 1) % max(step, 1) == 0]
    if len(sparse) == num_layers:
        return "all"
    if sparse and sparse == list(range(num_layers - len(sparse), num_layers)):
        return f"upper:{len(sparse)}"
    if sparse and sparse == list(range(sparse[0], num_layers, sparse[0] + 1)):
        return f"every:{sparse[0] + 1}"
    raise ValueError(f"sparse layers {sparse} of {num_layers}: sigmoe reads all, every n-th, or the upper ones")


def _rope_theta(data: Mapping[str, Any], format: str) -> float:
    """transformers 4 has rope_theta, 5 has rope_parameters."""
    rope = data.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters is {rope!r}; sigmoe reads rope_type default alone")
    default = 1e6 if format == "mixtral" else 10_000.0
    return _number(rope if "rope_theta" in rope else data, "rope_theta", default)


def _window(data: Mapping[str, Any], format: str) -> int | None:
    if format.startswith("qwen3"):
        if not _flag(data, "use_sliding_window", False):
            return None
        kinds = set(_list(data, "layer_types", str) or ["sliding_attention"])
        if kinds != {"sliding_attention"} or _whole(data, "max_window_layers", 0) != 0:
            raise ValueError("its layers differ in their attention window; sigmoe reads one window for all, or none")
    window = data.get("sliding_window", 4096 if format == "mistral" else None)
    return None if window is None else _whole(data, "sliding_window", window)


def _whole(data: Mapping[str, Any], key: str, default: object = _MISSING) -> int:
    value = data.get(key, default)
    if value is None and default is not _MISSING:
        value = default
    if type(value) is not int:
        raise ValueError(f"{key} must be a whole number, got {None if value is _MISSING else value!r}")
    return value


def _optional(data: Mapping[str, Any], key: str) -> int | None:
    return None if data.get(key) is None else _whole(data, key)


def _number(data: Mapping[str, Any], key: str, default: float) -> float:
    value = data.get(key, default)
    if type(value) not in (int, float):
        raise ValueError(f"{key} must be a number, got {value!r}")
    return float(value)


def _flag(data: Mapping[str, Any], key: str, default: bool) -> bool:
    value = data.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value


def _list(data: Mapping[str, Any], key: str, kind: type[ItemT]) -> list[ItemT]:
    value = data.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        raise ValueError(f"{key} must be a list of {'whole numbers' if kind is int else 'texts'}, got {value!r}")
    return value
