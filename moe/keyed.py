"""Keyed randomness: every draw is a pure function of a key, so no layout and no resume can shift it."""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the increment of splitmix64, as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def seed_of(*parts: int | str) -> int:
    """Return a 64-bit seed that depends on every part and on their order and types."""
    # The separator is doubled inside a part, so that no text can pass for two parts.
    text = "\x1f".join(f"{type(part).__name__}:{part}".replace("\x1f", "\x1f\x1f") for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """Return a counter-based (Philox) numpy generator seeded by the parts."""
    return np.random.Generator(np.random.Philox(seed_of(*parts)))


def keyed_permutation(number: int, *parts: int | str) -> NDArray[np.int64]:
    """Return 0 ... number - 1 in an order that the parts alone decide.

    The raw Philox stream is sorted, as only that stream is promised to stay the same in later versions of numpy.
    """
    bits = numpy_generator(*parts).bit_generator.random_raw(number)
    return np.argsort(bits, kind="stable").astype(np.int64)


def keyed_uniform(seed: int, index_T: Tensor, width: int) -> Tensor:
    """Return fp32 `[T, width]` in [0, 1): element (t, j) depends on (seed, index_T[t], j) alone.

    Counter-based (splitmix64; Steele, Lea, Flood 2014): a rank that holds some of the tokens draws what one would.
    """
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    column = torch.arange(width, device=index_T.device, dtype=torch.int64)
    bits = _mix(index_T.to(torch.int64) * _GOLDEN + signed).unsqueeze(-1) + column * _GOLDEN
    return (_shift(_mix(bits), 40).to(torch.float32)) * 2.0**-24


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * _MIX_1
    bits = (bits ^ _shift(bits, 27)) * _MIX_2
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical right shift of signed 64-bit integers."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
