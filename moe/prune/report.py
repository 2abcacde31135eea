"""What a pruning reports: report.json beside the model."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..config import layer_experts
from ..counts import count_parameters
from ..extract import Extraction, Submodel
from ..storage.durable import FileRecord
from ..stored import StoredModel
from .budget import Kept
from .merge import Groups
from .sums import CalibrationSums, LayerSums

REPORT_VERSION = 1


def describe_pruning(
    parent: StoredModel,
    identity: str,
    pruned: Submodel,
    extraction: Extraction,
    records: Mapping[str, FileRecord],
    *,
    kept: Kept,
    saliency: Sequence[Tensor],
    sums: CalibrationSums | None,
    groups: Groups | None,
    healed: Collection[str] = (),
) -> dict[str, Any]:
    """Return the report as plain JSON data.

    By sparse layer: `kept` ids, the `saliency` of every expert (None: not finite), `merged` the groups, and of the
    calibration tokens `load_before`, each expert's share of what is routed, and `load_after`, the kept ones' shares if
    the others' tokens went to them in proportion, or with their groups. `tensors`: every tensor's SHA-256 (None: not
    taken), where it comes from, and whether training changed it, as it did those `healed` (canonical names); those not
    healed and without `rows` and `mean_of` are the parent's byte for byte.
    """
    weights = [record.size for name, record in records.items() if name.endswith(".safetensors")]
    layers = [
        {"layer": layer, "kept": list(kept[index]), "saliency": [_number(x) for x in saliency[index].tolist()]}
        for index, layer in enumerate(parent.config.sparse_layer_ids)
    ]
    for index, layer in enumerate(layers):
        ids = [(expert,) for expert in kept[index]] if groups is None else groups[index]
        layer |= {} if groups is None else {"merged": [list(group) for group in ids]}
        layer |= {} if sums is None else _loads(sums.layers[index], ids)
    return {
        "format_version": REPORT_VERSION,
        "domains": list(pruned.registry.names),
        "format": extraction.format,
        "reason": extraction.reason,
        "parent": {
            "name": parent.path.name,
            "identity": identity,
            "format": parent.format,
            "experts": layer_experts(parent.config, parent.registry),
            "parameters": asdict(count_parameters(parent.config, parent.registry)),
            "bytes": {"tensors": sum(map(parent.tensors.num_bytes, parent.tensors.names()))},
        },
        "experts": layer_experts(pruned.config, pruned.registry),
        "parameters": asdict(count_parameters(pruned.config, pruned.registry)),
        "bytes": {"tensors": extraction.num_bytes, "files": sum(weights)},
        "text": None if sums is None else dict(sums.text),
        "layers": layers,
        "tensors": {
            tensor.name: {
                "source": tensor.source,
                "rows": list(tensor.rows) if tensor.rows else None,
                "mean_of": [name for name, _ in pruned.pieces[tensor.canonical].shares] or None,
                "healed": tensor.canonical in healed,
                "sha256": tensor.sha256,
            }
            for tensor in extraction.kept
        },
    }


def _loads(layer: LayerSums, groups: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    counts = layer.count_E.tolist()
    after = [sum(counts[expert] for expert in group) for group in groups]
    return {"load_before": _shares(counts), "load_after": _shares(after)}


def _shares(counts: Sequence[int]) -> list[float]:
    total = max(sum(counts), 1)
    return [count / total for count in counts]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
