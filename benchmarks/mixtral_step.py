"""The peer: transformers' Mixtral of the same shape, with one of its implementations of the experts.

The only file that imports transformers for a benchmark; it is imported by the worker that measures this peer.
"""

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig, MixtralForCausalLM

from .train_step import OPTIMIZER, Step, StepShape


def mixtral_step(shape: StepShape, implementation: str) -> Step:
    """Return one training step; `implementation` of the experts: eager, grouped_mm or another it has.

    Several processes train it data-parallel, and return their parts of the mean loss.
    """
    config = shape.model
    assert config.router.name == "top_k"
    assert config.sparse_layers == "all"
    mixtral = MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.expert_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_width,
        num_local_experts=config.router.num_experts,
        num_experts_per_tok=config.router.top_k,
        output_router_logits=True,
        # Their loss is K at perfect balance, ours 1.
        router_aux_loss_coef=config.router.auxiliary_loss / config.router.top_k,
        rms_norm_eps=config.norm_eps,
        sliding_window=config.sliding_window,
        tie_word_embeddings=config.tie_embeddings,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM._from_config(mixtral, experts_implementation=implementation)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
        fused=True,
    )
    token_BS = shape.tokens()
    trained = model if shape.ranks == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step(number: int) -> float:
        loss: torch.Tensor = trained(input_ids=token_BS, labels=token_BS).loss
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()) / shape.ranks

    return step
