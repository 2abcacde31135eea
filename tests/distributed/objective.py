"""What the compared sides share: a micro-batch's loss, the load it starts from, how near to ties gates are."""

import torch

from sigmoe.moe.initialize import draw
from sigmoe.moe.routers import LearnedGate


def objective(model, micro, training, labels, tokens):
    """Run a micro-batch; return its part of the loss (of a global batch of so many labels and tokens), and output."""
    output = model(
        micro.token_BS,
        start_BS=micro.start_BS,
        domain_B=micro.domain_B,
        sample_B=micro.sample_B,
        label_BS=micro.label_BS,
        training=training,
    )
    router, share = model.config.router, 1 / (len(output.stats) * tokens)
    balance, z = (sum_over_layers(output, name) for name in ("balance_sum", "z_sum"))
    return output.loss_sum / labels + share * (router.auxiliary_loss * balance + router.z_loss * z), output


def sum_over_layers(output, name):
    """The sum of one of the sparse layers' stats."""
    return torch.stack([getattr(stats, name) for stats in output.stats]).sum()


def fractions(config, registry):
    """The previous step's load of every sparse layer, made up."""
    shares = {}
    for index, layer in enumerate(config.sparse_layer_ids):
        groups = 1 if config.router.name == "top_k" else len(registry.names)
        size = 1 + max(expert for experts in registry.sets(index) for expert in experts)
        shares[layer] = draw(f"fractions{layer}", (groups, size), 1.0, 2).abs()
        shares[layer] /= shares[layer].sum(1, keepdim=True)
    return shares


def watch_margins(model):
    """Let every gate note the least distance between the last expert chosen and the first that is not."""
    margins = [float("inf")]

    def watch(gate):
        choose, last = gate.choose, gate.config.top_k

        def watched(x_BSD, experts):
            logits, bias = gate.logits(x_BSD.detach(), experts)
            score = logits.detach().softmax(-1) + (0 if bias is None else bias)
            if last < score.shape[-1]:
                ordered = score.sort(-1, descending=True).values
                margins[0] = min(margins[0], float((ordered[..., last - 1] - ordered[..., last]).min()))
            return choose(x_BSD, experts)

        gate.choose = watched

    for module in model.modules():
        if isinstance(module, LearnedGate):
            watch(module)
    return margins
