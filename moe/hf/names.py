"""Canonical names <-> the names that each architecture of transformers has on disk."""

import re

from .formats import CANONICAL_FORMATS

_EXPERT = re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight$")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def hf_name(format: str, name: str) -> str:
    """Return the name on disk, in `format`, of the tensor `name`."""
    if format in CANONICAL_FORMATS:
        return name
    name = _EXPERT.sub(lambda match: f".mlp.experts.{match[1]}.{_PROJECTIONS[match[2]]}.weight", name)
    return name.replace(".block_sparse_moe.gate.", ".mlp.gate.")


def dense_name(name: str) -> str:
    """Return what the only expert's tensor `name` is called where its layer is dense."""
    return _EXPERT.sub(lambda match: f".mlp.{_PROJECTIONS[match[2]]}.weight", name)
