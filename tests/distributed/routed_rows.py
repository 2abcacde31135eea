"""Notes what every micro-batch routes, so that formulas of traffic can be held to what was sent."""

from collections import Counter

from sigmoe.moe.layer import MoELayer
from sigmoe.parallel.traffic import MicroBatch, Rows


def watch_rows(model):
    """Note of every forward its tokens, those of each head product, by layer rows out, rows in and pairs dropped."""
    notes = []

    def begin(module, args, kwargs):
        token_BS, domains = args[0], kwargs["domain_B"].tolist()
        slots = Counter(domains).values() if model.config.num_slots > 1 else [len(domains)]
        heads = [sequences * token_BS.shape[1] for sequences in slots]
        notes.append({"tokens": token_BS.numel(), "heads": heads, "rows": {}})

    def watch(layer):
        dispatch, dropped = layer.dispatcher.dispatch, layer.dispatcher.dropped

        def watched(x_TD, routing):
            rows_RD, count_E, receipt = dispatch(x_TD, routing)
            # A receipt of one process without tensor and expert parallelism knows of no sending: all rows stay.
            sent = sum(getattr(receipt, "sent", [rows_RD.shape[0]]))
            notes[-1]["rows"][layer.layer] = [sent, rows_RD.shape[0], int(dropped(receipt))]
            return rows_RD, count_E, receipt

        layer.dispatcher.dispatch = watched

    model.register_forward_pre_hook(begin, with_kwargs=True)
    for module in model.modules():
        if isinstance(module, MoELayer):
            watch(module)
    return notes


def micro_batches(notes):
    """The notes as the formulas want them."""
    return [
        MicroBatch(
            tokens=note["tokens"],
            heads=tuple(note["heads"]),
            rows={layer: Rows(sent, received) for layer, (sent, received, _) in note["rows"].items()},
        )
        for note in notes
    ]
