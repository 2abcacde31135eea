"""SwiGLU feed-forward of many experts: over rows grouped by expert, and for inference."""

from .op import expert_mlp
from .routed import routed_mlp

__all__ = ["expert_mlp", "routed_mlp"]
