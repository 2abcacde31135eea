"""The table that a run closes with."""

from rich.table import Table

from ..moe.data.baseline import unigram_bits_per_byte
from .console import table
from .session import SessionResult
from .trainer import Trainer


def closing_table(trainer: Trainer, result: SessionResult) -> Table:
    """Return held-out loss, perplexity, bits per byte before and after, tokens seen, load of its experts, by domain."""
    consumed = trainer.step * trainer.config.global_batch
    tokens, epochs = trainer.loader.tokens_seen(consumed), trainer.loader.epochs(consumed)
    rows = []
    for name, after in result.after.items():
        before = result.before[name]
        rows.append(
            [
                name,
                f"{before.loss:.3f} → {after.loss:.3f}",
                f"{before.perplexity:,.0f} → {after.perplexity:,.1f}",
                f"{before.bits_per_byte:.3f} → {after.bits_per_byte:.3f}",
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
    return table("before → after", columns, rows)


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
