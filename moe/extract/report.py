"""What an extraction reports: extraction.json beside the submodel."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..counts import count_parameters
from ..storage.durable import FileRecord
from ..stored import StoredModel
from .plan import Submodel
from .verify import DomainCheck
from .write import Extraction, formula_bytes

REPORT_VERSION = 1


def describe(
    parent: StoredModel,
    identity: str,
    submodel: Submodel,
    extraction: Extraction,
    checks: tuple[DomainCheck, ...],
    records: Mapping[str, FileRecord],
) -> dict[str, Any]:
    """Return the report as plain JSON data: parent, format and reason, parameters, bytes, checks, every tensor's hash.

    `bytes.formula` counts shared + sets + slots + tables from the config, `bytes.tensors` what was written,
    `bytes.files` the weight files with their headers.
    """
    weights = [record.size for name, record in records.items() if name.endswith(".safetensors")]
    return {
        "format_version": REPORT_VERSION,
        "domains": list(submodel.registry.names),
        "format": extraction.format,
        "reason": extraction.reason,
        "parent": {
            "name": parent.path.name,
            "identity": identity,
            "format": parent.format,
            "domains": len(parent.registry.domains),
            "parameters": asdict(count_parameters(parent.config, parent.registry)),
            "bytes": {"tensors": sum(map(parent.tensors.num_bytes, parent.tensors.names()))},
        },
        "parameters": asdict(count_parameters(submodel.config, submodel.registry)),
        "bytes": {
            "formula": formula_bytes(submodel, extraction.dtype),
            "tensors": extraction.num_bytes,
            "files": sum(weights),
        },
        "checks": [asdict(check) for check in checks],
        "tensors": {
            kept.name: {"source": kept.source, "rows": list(kept.rows) if kept.rows else None, "sha256": kept.sha256}
            for kept in extraction.kept
        },
    }
