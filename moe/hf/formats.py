"""Which architecture of transformers computes exactly what a model computes, if one does, and why not if none.

one domain, every layer sparse, no QK-norm               Mixtral
one domain, QK-norm by head (dense layers allowed)       Qwen3-MoE
one domain, QK-norm over the whole width, all sparse     OLMoE
dense, no QK-norm                                        Mistral
dense, QK-norm by head                                   Qwen3
"""

from dataclasses import dataclass
from typing import Literal, get_args

from ..config import ModelConfig, layer_experts, num_experts
from ..domains import DomainRegistry

HFFormat = Literal["mixtral", "qwen3_moe", "olmoe", "mistral", "qwen3"]
HF_FORMATS: tuple[str, ...] = get_args(HFFormat)
# Read alone: without biases a Llama computes what a Mistral without a window does, and is written as one.
READ_FORMATS = (*HF_FORMATS, "llama")
# Their names on disk are the canonical ones.
CANONICAL_FORMATS = ("mixtral", "mistral", "qwen3", "llama")
ARCHITECTURES: dict[str, str] = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True, kw_only=True)
class FormatChoice:
    """The format that fits a model (None: sigmoe's own alone), and one line that says why."""

    format: HFFormat | None
    reason: str


def choose_format(config: ModelConfig, registry: DomainRegistry) -> FormatChoice:
    """Choose the architecture of transformers that gives this model's logits."""
    if config.num_slots > 1:
        return _none("it has several embedding slots: extract one domain, which has one")
    if not config.sparse_layer_ids:
        return _dense(config)
    misfit = _router_misfit(config, registry)
    if misfit is not None:
        return _none(misfit)
    sparse = f"one gate, {num_experts(registry, 0)} experts in each sparse layer"
    match config.qk_norm:
        case "none":
            return _mixtral(config, sparse)
        case "head":
            return FormatChoice(format="qwen3_moe", reason=f"{sparse}, QK-norm by head")
        case "width":
            return _olmoe(config, sparse)


def _none(reason: str) -> FormatChoice:
    return FormatChoice(format=None, reason=reason)


def _dense(config: ModelConfig) -> FormatChoice:
    match config.qk_norm:
        case "none":
            return FormatChoice(format="mistral", reason="every layer is dense")
        case "head":
            return FormatChoice(format="qwen3", reason="every layer is dense, QK-norm by head")
        case "width":
            return _none("no dense model of transformers has QK-norm over the whole width: model.qk_norm=head or none")


def _router_misfit(config: ModelConfig, registry: DomainRegistry) -> str | None:
    """What about the router no model of transformers can say."""
    router = config.router
    if router.name == "domain_top_k" and len(registry.domains) > 1:
        return "it has several domains, and transformers knows no domain router: extract one domain"
    if router.name == "rre":
        return (
            "random routed experts choose by a table of token ids, which transformers lacks: train with sets of one "
            "expert as wide as the dense layers (Mistral), or with router=domain_top_k (Mixtral)"
        )
    sizes = sorted(set(layer_experts(config, registry)))
    if len(sizes) > 1:
        return f"its layers have {sizes[0]} to {sizes[-1]} experts, transformers wants one number: give all the same"
    if router.balance == "bias":
        return "its gate has a selection bias, which transformers lacks: train with router.balance=loss"
    return None


def _mixtral(config: ModelConfig, sparse: str) -> FormatChoice:
    if len(config.sparse_layer_ids) != config.num_layers:
        return _none(
            "it has dense layers, which Mixtral lacks: model.qk_norm=head (Qwen3-MoE) or model.sparse_layers=all"
        )
    if not config.router.renormalize:
        return _none("Mixtral renormalises its gate: router.renormalize=true, or model.qk_norm=head (Qwen3-MoE)")
    return FormatChoice(format="mixtral", reason=f"{sparse}, every layer sparse, no QK-norm")


def _olmoe(config: ModelConfig, sparse: str) -> FormatChoice:
    if len(config.sparse_layer_ids) != config.num_layers:
        return _none("it has dense layers, which OLMoE lacks: model.qk_norm=head (Qwen3-MoE) or sparse_layers=all")
    if config.head_width * config.num_heads != config.dim:
        return _none("OLMoE's heads are dim / num_heads wide: model.head_dim=null, or model.qk_norm=head (Qwen3-MoE)")
    if config.sliding_window is not None:
        return _none("OLMoE has no sliding window: model.sliding_window=null, or model.qk_norm=head (Qwen3-MoE)")
    return FormatChoice(format="olmoe", reason=f"{sparse}, every layer sparse, QK-norm over the whole width")
