"""SwiGLU feed-forward of many experts: over rows grouped by expert, and over a few tokens."""

from .few import expert_mlp_few
from .op import expert_mlp

__all__ = ["expert_mlp", "expert_mlp_few"]
