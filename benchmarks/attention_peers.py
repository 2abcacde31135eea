"""torch's own ways to the same attention: scaled_dot_product_attention, variable lengths, FlexAttention.

Shape letters: B sequences, S positions, H query heads, G kv heads, C head width.
"""

import importlib
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.attention import attention
from .attention_case import Inputs

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def contender(name: str, inputs: Inputs) -> Callable[[], Tensor]:
    """Return the forward of sigmoe, sdpa, cudnn or flash (sdpa held to it), varlen or flex.

    Raises ValueError where the contender has no way to the inputs' form.
    """
    match name:
        case "sigmoe":
            return lambda: _ours(inputs)
        case "varlen":
            return _varlen(inputs)
        case "flex":
            return _flex(inputs)
    return _sdpa(inputs, BACKENDS.get(name))


def _ours(inputs: Inputs) -> Tensor:
    q, k, v = inputs.leaves
    return attention(q, k, v, inputs.start_BS, window=inputs.window, backend="triton" if q.is_cuda else "torch")


def _ends(inputs: Inputs) -> list[int]:
    """Return where the documents of all sequences end, in tokens from the first."""
    B, S = inputs.start_BS.shape
    first_BS = inputs.start_BS == torch.arange(S, device=inputs.start_BS.device)
    begins: list[int] = first_BS.flatten().nonzero().flatten().tolist()
    return [*begins[1:], B * S]


def _sdpa(inputs: Inputs, backend: SDPBackend | None) -> Callable[[], Tensor]:
    B, S = inputs.start_BS.shape
    ends = _ends(inputs)

    def attend(leaves: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in leaves)
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)

    def held() -> AbstractContextManager[None]:
        return nullcontext() if backend is None else sdpa_kernel(backend)

    def whole(mask: Tensor | None) -> Tensor:
        with held():
            return attend(inputs.leaves, mask)

    def by_document() -> Tensor:
        sizes = [end - begin for begin, end in zip([0, *ends], ends)]
        with held():
            parts = zip(*(torch.split(x.flatten(0, 1), sizes) for x in inputs.leaves))
            return torch.cat([attend([x[None] for x in part])[0] for part in parts]).view(inputs.q_BSHC.shape)

    if inputs.window is not None:
        if backend is not None:
            raise ValueError("no window")
        i = torch.arange(S, device=inputs.start_BS.device)
        mask_SS = (i <= i[:, None]) & (i[:, None] - i < inputs.window)
        return lambda: whole(mask_SS)
    return by_document if len(ends) > B else lambda: whole(None)


def _varlen(inputs: Inputs) -> Callable[[], Tensor]:
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    ends = [0, *_ends(inputs)]
    longest = max(end - begin for begin, end in itertools.pairwise(ends))
    bounds = torch.tensor(ends, dtype=torch.int32, device=inputs.start_BS.device)
    window = (-1 if inputs.window is None else inputs.window - 1, 0)
    groups = {"enable_gqa": True} if inputs.q_BSHC.shape[2] != inputs.k_BSGC.shape[2] else {}

    def forward() -> Tensor:
        rows = (x.flatten(0, 1) for x in inputs.leaves)
        out: Tensor = varlen_attn(*rows, bounds, bounds, longest, longest, window_size=window, **groups)
        return out.view(inputs.q_BSHC.shape)

    return forward


def _flex(inputs: Inputs) -> Callable[[], Tensor]:
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    B, S = inputs.start_BS.shape
    start_BS, window = inputs.start_BS, S if inputs.window is None else inputs.window

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= start_BS[b, i]) & (i - j < window)

    device = inputs.q_BSHC.device
    make_mask: Any = torch.compile(flex.create_block_mask)
    attend: Any = torch.compile(flex.flex_attention)
    # Made once, as the layers of a step share it.
    mask = make_mask(visible, B, None, S, S, device=device)
    grouped = inputs.q_BSHC.shape[2] != inputs.k_BSGC.shape[2]

    def forward() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs.leaves)
        out: Tensor = attend(q, k, v, block_mask=mask, enable_gqa=grouped)
        return out.transpose(1, 2)

    return forward
