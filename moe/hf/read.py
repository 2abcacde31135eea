"""config.json of a transformers model -> our config; what would change the arithmetic and we lack is refused."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ..config import ModelConfig, RouterConfig
from .formats import READ_FORMATS

ItemT = TypeVar("ItemT", int, str)
_MISSING = object()
_EXPERT_COUNTS = ("num_local_experts", "num_experts")  # as transformers' versions and classes call it
# What must stand in config.json as given here, or not at all (null).
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "clip_qkv": None,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    # Of relatives: Qwen2-MoE and DeepSeek have experts that every token passes.
    "shared_expert_intermediate_size": 0,
    "n_shared_experts": 0,
    "num_shared_experts": 0,
}
# What transformers 5 takes where a key is missing, and its classes differ.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8},
    "qwen3_moe": {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8},
    "olmoe": {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.01},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "llama": {"sliding_window": None},
}
_QK_NORM: dict[str, Literal["head", "width"]] = {"qwen3_moe": "head", "qwen3": "head", "olmoe": "width"}


def model_config(data: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """Return the model type that config.json names and our config of the same model, as one domain.

    Keys that are missing have transformers' defaults, but for the sizes. Raises ValueError naming the key that is
    missing, of a wrong type, or asks for what sigmoe lacks.
    """
    format = data.get("model_type")
    if format not in READ_FORMATS:
        raise ValueError(f"model_type is {format!r}; sigmoe reads {', '.join(READ_FORMATS)}")
    data = {**_defaults(format, data), **data}
    for key, value in _FIXED.items():
        if data.get(key) is not None and data[key] != value:
            raise ValueError(f"{key} is {data[key]!r}; sigmoe reads models with {value!r} alone")
    dim, heads = _whole(data, "hidden_size"), _whole(data, "num_attention_heads")
    sparse = format in ("mixtral", "qwen3_moe", "olmoe")
    return format, ModelConfig(
        vocab_size=_whole(data, "vocab_size"),
        dim=dim,
        num_layers=_whole(data, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_whole(data, "num_key_value_heads", heads),
        head_dim=None if format == "olmoe" else _optional(data, "head_dim"),
        expert_dim=_whole(data, "moe_intermediate_size" if format == "qwen3_moe" else "intermediate_size"),
        ffn_dim=_whole(data, "intermediate_size"),
        sparse_layers=_sparse_layers(data) if sparse else "none",
        qk_norm=_QK_NORM.get(format, "none"),
        rope_theta=_rope_theta(data),
        norm_eps=_number(data, "rms_norm_eps", 1e-6),
        sliding_window=_window(data, format),
        tie_embeddings=_flag(data, "tie_word_embeddings", False),
        init_std=_number(data, "initializer_range", 0.02),
        router=_router(data, format) if sparse else RouterConfig(name="top_k", num_experts=1, top_k=1),
    )


def _defaults(format: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """What `format` has where a key is missing; the number of experts goes by two names."""
    known = any(key in data for key in _EXPERT_COUNTS)
    return {key: value for key, value in _DEFAULTS[format].items() if not (known and key in _EXPERT_COUNTS)}


def _router(data: Mapping[str, Any], format: str) -> RouterConfig:
    key = next((key for key in _EXPERT_COUNTS if key in data), "num_experts")
    top_k = _whole(data, "num_experts_per_tok", 2)
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


def _rope_theta(data: Mapping[str, Any]) -> float:
    """transformers 4 has rope_theta, 5 has rope_parameters."""
    rope = data.get("rope_parameters") or {}
    plain = {"rope_type": "default", "partial_rotary_factor": 1.0}
    if not isinstance(rope, Mapping) or any(rope[key] != plain.get(key) for key in rope if key != "rope_theta"):
        raise ValueError(f"rope_parameters is {rope!r}; sigmoe reads rope_type default and a rope_theta alone")
    return _number(rope if "rope_theta" in rope else data, "rope_theta", 10_000.0)


def _window(data: Mapping[str, Any], format: str) -> int | None:
    """The window of all layers; transformers has none for a Llama or an OLMoE, whatever their config.json says."""
    kinds, window = set(_list(data, "layer_types", str)), None
    if format.startswith("qwen3"):
        if _flag(data, "use_sliding_window", False):
            window = _whole(data, "sliding_window", 4096)
            if not kinds and _whole(data, "max_window_layers", 28 if format == "qwen3" else 0):
                kinds = {"full_attention"}  # below that layer
    elif format in ("mixtral", "mistral"):
        window = _optional(data, "sliding_window")
    if kinds - {"full_attention" if window is None else "sliding_attention"}:
        raise ValueError("its layers differ in their attention window; sigmoe reads one window for all, or none")
    return window


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
