"""Exact extraction: the submodel of some domains, cut out of a model tensor by tensor and proved equal to it."""

from .in_transformers import TransformersCheck, check_in_transformers
from .plan import Piece, Submodel, plan_submodel
from .report import REPORT_VERSION, describe
from .verify import DomainCheck, verify_domain, verify_tensors
from .write import Extraction, SubmodelWriter, formula_bytes

__all__ = [
    "REPORT_VERSION",
    "DomainCheck",
    "Extraction",
    "Piece",
    "Submodel",
    "SubmodelWriter",
    "TransformersCheck",
    "check_in_transformers",
    "describe",
    "formula_bytes",
    "plan_submodel",
    "verify_domain",
    "verify_tensors",
]
