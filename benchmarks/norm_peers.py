"""Liger's and fla's kernels for the memory-bound operations; both run on a GPU alone, and are imported only there."""

import importlib

from .norm_operation import EPS, Forward, Inputs, Operation

# What each has; fla's rotary embedding comes after its norm.
PEERS: dict[str, tuple[Operation, ...]] = {
    "liger": ("rms_norm", "add_rms_norm", "swiglu"),
    "fla": ("rms_norm", "add_rms_norm", "qk_norm_head", "qk_norm_width", "swiglu"),
}
PACKAGES = {"liger": "liger_kernel", "fla": "fla"}


def peer(name: str, inputs: Inputs) -> Forward:
    """Return the forward of liger or fla."""
    return _liger(inputs) if name == "liger" else _fla(inputs)


def _liger(inputs: Inputs) -> Forward:
    ops = importlib.import_module("liger_kernel.ops")
    # Not in place: the gradient that comes in is the output itself.
    options = EPS, 0.0, "llama", False
    match inputs.operation:
        case "rms_norm":
            return lambda: ops.LigerRMSNormFunction.apply(*inputs.leaves, *options)
        case "add_rms_norm":
            return lambda: ops.LigerFusedAddRMSNormFunction.apply(*inputs.leaves, *options)
    return lambda: ops.LigerSiLUMulFunction.apply(*inputs.leaves[0].chunk(2, -1))


def _fla(inputs: Inputs) -> Forward:
    norm = importlib.import_module("fla.modules.layernorm").rms_norm
    match inputs.operation:
        case "rms_norm":
            x, weight = inputs.leaves
            return lambda: norm(x, weight, None, eps=EPS)
        case "add_rms_norm":
            x, branch, weight = inputs.leaves
            return lambda: norm(x, weight, None, residual=branch, eps=EPS, prenorm=True)
        case "swiglu":
            activation = importlib.import_module("fla.modules.activations").swiglu
            return lambda: activation(*inputs.leaves[0].chunk(2, -1))
    rotate = importlib.import_module("fla.modules.rotary").rotary_embedding
    (x, weight), cos, sin = inputs.leaves, inputs.cos_BS1Z[0, :, 0], inputs.sin_BS1Z[0, :, 0]
    flat = x if inputs.operation == "qk_norm_head" else x.flatten(-2)
    return lambda: rotate(norm(flat, weight, None, eps=EPS).view_as(x), cos, sin)
