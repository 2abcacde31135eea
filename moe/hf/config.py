"""The JSON files that transformers wants beside the weights."""

from typing import Any

from ..config import ModelConfig, num_experts
from ..data.tokenizer import END_OF_TEXT, PADDING
from ..domains import DomainRegistry
from .formats import ARCHITECTURES, CANONICAL_FORMATS, HFFormat, choose_format


def hf_config(
    config: ModelConfig, registry: DomainRegistry, *, sequence_length: int, dtype: str, end_of_text: int, padding: int
) -> dict[str, Any] | None:
    """Return config.json where canonical names are those of an architecture that fits, else None.

    With it `model/` of a checkpoint is a directory that transformers loads as it stands.
    """
    format = choose_format(config, registry).format
    if format is None or format not in CANONICAL_FORMATS:
        return None
    sizes = {"sequence_length": sequence_length, "end_of_text": end_of_text, "padding": padding}
    return config_json(format, config, registry, dtype=dtype, **sizes)


def config_json(
    format: HFFormat,
    config: ModelConfig,
    registry: DomainRegistry,
    *,
    sequence_length: int,
    dtype: str,
    end_of_text: int,
    padding: int,
) -> dict[str, Any]:
    """Return config.json of a model that fits `format`; `model_config` reads it back."""
    tokens = {
        "max_position_embeddings": sequence_length,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": padding,
        "dtype": dtype,
    }
    return {**shape_json(format, config, registry), **tokens}


def generation_config(*, end_of_text: int, padding: int) -> dict[str, Any]:
    """Return generation_config.json: greedy, ends at end-of-text."""
    return {"do_sample": False, "eos_token_id": end_of_text, "pad_token_id": padding}


def tokenizer_config(sequence_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json for a tokenizer.json of ours."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
    }


def shape_json(format: HFFormat, config: ModelConfig, registry: DomainRegistry) -> dict[str, Any]:
    """Return the part of config.json that says what is computed, of a model that fits `format`."""
    common = {
        "architectures": [ARCHITECTURES[format]],
        "model_type": format,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
    }
    match format:
        case "mixtral":
            return {**common, **_attention(config), **_experts(config, registry, "num_local_experts")}
        case "qwen3_moe":
            return {
                **common,
                **_attention(config),
                **_experts(config, registry, "num_experts"),
                "intermediate_size": config.dense_dim,
                "moe_intermediate_size": config.expert_dim,
                "norm_topk_prob": config.router.renormalize,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [i for i in range(config.num_layers) if i not in config.sparse_layer_ids],
                "use_sliding_window": config.sliding_window is not None,
                "max_window_layers": 0,
            }
        case "olmoe":
            gate = {"norm_topk_prob": config.router.renormalize, "clip_qkv": None}
            return {**common, **_experts(config, registry, "num_experts"), **gate}
        case "mistral":
            return {**common, **_attention(config), "intermediate_size": config.dense_dim}
        case "qwen3":
            kind = "full_attention" if config.sliding_window is None else "sliding_attention"
            return {
                **common,
                **_attention(config),
                "intermediate_size": config.dense_dim,
                "use_sliding_window": config.sliding_window is not None,
                "max_window_layers": 0,
                "layer_types": [kind] * config.num_layers,
            }


def _attention(config: ModelConfig) -> dict[str, Any]:
    return {"head_dim": config.head_width, "sliding_window": config.sliding_window}


def _experts(config: ModelConfig, registry: DomainRegistry, count: str) -> dict[str, Any]:
    router = config.router
    return {
        "intermediate_size": config.expert_dim,
        count: num_experts(registry, 0),
        "num_experts_per_tok": router.top_k,
        "router_aux_loss_coef": router.auxiliary_loss / router.top_k,
    }
