"""What the Triton kernels share: addresses that do not overflow, and tuning that is kept on disk."""

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl


@triton.jit
def offset(row, stride):
    """Return `row * stride` in int64: in int32 a tensor of more than 2^31 elements would be addressed wrongly."""
    return tl.cast(row, tl.int64) * stride


def tuned(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable[[Any], Any]:
    """Let a kernel take the fastest of `configs` for each value of the arguments `key`; interpreted the first.

    Timings are kept in Triton's own cache directory, by target, kernel and key. Configurations may not differ in the
    order of a sum: the clock must not decide bits.
    """
    chosen = configs[:1] if triton.knobs.runtime.interpret else configs
    return triton.autotune(configs=list(chosen), key=list(key), cache_results=True)
