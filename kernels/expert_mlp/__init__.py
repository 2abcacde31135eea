"""SwiGLU feed-forward of many experts over rows grouped by expert."""

from .op import expert_mlp

__all__ = ["expert_mlp"]
