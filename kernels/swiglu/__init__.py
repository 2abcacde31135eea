"""SwiGLU activation."""

from .op import swiglu, swiglu_forward

__all__ = ["swiglu", "swiglu_forward"]
