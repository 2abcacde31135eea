"""SwiGLU activation."""

from .op import swiglu

__all__ = ["swiglu"]
