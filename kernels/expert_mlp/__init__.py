"""SwiGLU feed-forward of many experts: over rows grouped by expert, over tokens, and for inference."""

from .op import expert_mlp, moe_mlp
from .routed import routed_mlp

__all__ = ["expert_mlp", "moe_mlp", "routed_mlp"]
