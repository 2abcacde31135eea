"""The table that a run closes with."""

from ..moe.data.baseline import unigram_bits_per_byte
from .console import print_table
from .evaluation import Losses
from .trainer import Trainer


def print_closing_table(trainer: Trainer, before: Losses, after: Losses) -> None:
    """Print held-out loss, perplexity, bits per byte before and after, tokens seen, load of its experts, by domain."""
    consumed = trainer.step * trainer.config.global_batch
    tokens, epochs = trainer.loader.tokens_seen(consumed), trainer.loader.epochs(consumed)
    rows = []
    for name in after:
        rows.append(
            [
                name,
                f"{before[name].loss:.3f} → {after[name].loss:.3f}",
                f"{before[name].perplexity:,.0f} → {after[name].perplexity:,.1f}",
                f"{before[name].bits_per_byte:.3f} → {after[name].bits_per_byte:.3f}",
                f"{unigram_bits_per_byte(trainer.dataset, name, trainer.config.evaluate.tokens):.3f}",
                f"{tokens[name]:,}",
                f"{epochs[name]:.2f}",
                expert_load(trainer, name),
            ]
        )
    columns = [
        "domain",
        "held-out loss",
        "perplexity",
        "bits per byte",
        "unigram",
        "tokens",
        "epochs",
        "load of its experts",
    ]
    expendable = ("perplexity", "epochs", "load of its experts", "tokens")
    print_table(f"step 0 → step {trainer.step}", columns, rows, expendable=expendable)


def expert_load(trainer: Trainer, domain: str) -> str:
    """Return the share of the domain's routed rows that each of its experts took, in percent, mean over sparse layers.

    Sets of more than eight experts are given as least and most.
    """
    row, shares = trainer.registry.id_of(domain), []
    for index, count_NE in enumerate(trainer.load_NE.values()):
        count = count_NE[row, list(trainer.registry.sets(index)[row])].double()
        shares.append(count / count.sum().clamp(min=1))
    if not shares or len({len(share) for share in shares}) > 1:
        return "-"
    mean = [100 * float(share) for share in sum(shares[1:], shares[0]) / len(shares)]
    if len(mean) > 8:
        return f"{min(mean):.1f} … {max(mean):.1f} %"
    return " ".join(f"{share:.0f}" for share in mean) + " %"
