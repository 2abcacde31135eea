"""config.json for the models that transformers knows."""

from ..config import ModelConfig, num_experts
from ..domains import DomainRegistry


def hf_config(
    config: ModelConfig, registry: DomainRegistry, *, sequence_length: int, dtype: str, end_of_text: int, padding: int
) -> dict[str, object] | None:
    """Return Mixtral's config where the model is one, else None.

    It is one where a single renormalised gate spans equally many experts in every layer: a global gate, or that of an
    only domain. Canonical names are Mixtral's, so that with this file `model/` of a checkpoint is a directory that
    transformers loads.
    """
    router, sparse = config.router, range(len(config.sparse_layer_ids))
    one_gate = router.name == "top_k" or (router.name == "domain_top_k" and len(registry.domains) == 1)
    fits = one_gate and router.renormalize and router.balance != "bias" and config.qk_norm == "none"
    sizes = {num_experts(registry, index) for index in sparse}
    if not fits or config.num_slots > 1 or len(sparse) != config.num_layers or len(sizes) != 1:
        return None
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.expert_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_embeddings,
        "num_local_experts": sizes.pop(),
        "num_experts_per_tok": router.top_k,
        "router_aux_loss_coef": router.auxiliary_loss / router.top_k,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": padding,
        "torch_dtype": dtype,
    }
