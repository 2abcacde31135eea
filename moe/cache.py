"""The keys and values that a model keeps of the tokens it has seen.

Shape letters: L layers, B sequences, S new positions, J positions, G key/value heads, C head width, Z = C/2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.attention import Sight
from ..kernels.rope import rotation
from .config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class CacheStep:
    """What all layers share in a pass of new tokens."""

    start_BS: Tensor
    goes_on: bool  # whether every sequence goes on in the document that it ends in
    cos_BS1Z: Tensor
    sin_BS1Z: Tensor
    sight: Sight | None  # of the positions that any query sees; None: nothing is in the cache yet


class KeyValueCache:
    """Keys and values `[B, G, J, C]` of every layer, with memory for `capacity` positions; full, it doubles.

    Memory is taken layer by layer, so that growing and `keep` hold but one layer twice.

    `length` positions are filled, the same for every sequence: sequences of different lengths are padded on the left,
    and `start_B` is the first position of the document that each sequence ends in.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.capacity, self.length = config, capacity, 0
        self.start_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._latest_start = 0
        shape = (2, batch, config.num_kv_heads, capacity, config.head_width)
        self._layers = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self._prepare()

    def store(self, layer: int, k_BSGC: Tensor, v_BSGC: Tensor) -> None:
        """Put the new positions of one layer behind the filled ones; `advance` counts them after the last layer."""
        assert k_BSGC.shape[0] == self._layers[layer].shape[1], "another batch than the cache's"
        places = slice(self.length, self.length + k_BSGC.shape[1])
        self._layers[layer][0][:, :, places] = k_BSGC.transpose(1, 2)
        self._layers[layer][1][:, :, places] = v_BSGC.transpose(1, 2)

    def stored(self, layer: int, first: int, num_new: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer from position `first` to the end of the `num_new` new ones."""
        k_BGJC, v_BGJC = self._layers[layer][:, :, :, first : self.length + num_new]
        return k_BGJC, v_BGJC

    def reserve(self, num_new: int) -> None:
        """Make room for `num_new` positions behind the filled ones."""
        if self.length + num_new > self.capacity:
            self.capacity = max(2 * self.capacity, self.length + num_new)
            self._copy(slice(None))
            self._prepare()

    def step(self, num_new: int, start_BS: Tensor | None) -> CacheStep:
        """Return what the layers share in a pass of `num_new` tokens a sequence, whose documents begin at `start_BS`.

        None: each sequence goes on in the document that it ends in.
        """
        window, goes_on = self.config.sliding_window, start_BS is None
        if start_BS is None:
            start_BS = self.start_B[:, None].expand(-1, num_new)
        position_BS = torch.arange(self.length, self.length + num_new, device=start_BS.device) - start_BS
        sight = None
        if self.length > 0:
            first = 0 if window is None else max(0, self.length - window + 1)
            sight = Sight(
                start_BS=start_BS,
                first=first,
                num_keys=self.length + num_new - first,
                window=window,
                dtype=self._layers[0].dtype,
                # A single token sees all from `first` on but padding; to know that saves looking for what is hidden.
                sees_all=num_new == 1 and goes_on and self._latest_start <= first,
            )
        return CacheStep(
            start_BS=start_BS,
            goes_on=goes_on,
            cos_BS1Z=self._cos_JZ[position_BS].unsqueeze(2),
            sin_BS1Z=self._sin_JZ[position_BS].unsqueeze(2),
            sight=sight,
        )

    def advance(self, step: CacheStep) -> None:
        """Count the new positions of `step` as filled."""
        self.length += step.start_BS.shape[1]
        if not step.goes_on:
            self._start(step.start_BS[:, -1].clone())  # the caller may fill the tensor again

    def keep(self, row_B: Tensor) -> None:
        """Keep the sequences `row_B` alone, in that order."""
        self._start(self.start_B[row_B])
        self._copy(row_B)

    def _start(self, start_B: Tensor) -> None:
        self.start_B, self._latest_start = start_B, int(start_B.max())

    def _prepare(self) -> None:
        """Take the angles of all positions."""
        position_1J = torch.arange(self.capacity, device=self.start_B.device)[None]
        config, dtype = self.config, self._layers[0].dtype
        cos_1J1Z, sin_1J1Z = rotation(position_1J, config.rope_theta, config.head_width, dtype)
        self._cos_JZ, self._sin_JZ = cos_1J1Z[0, :, 0], sin_1J1Z[0, :, 0]

    def _copy(self, rows: Tensor | slice) -> None:
        filled = slice(self.length)
        for layer, both in enumerate(self._layers):
            kept = both[:, rows, :, filled]
            self._layers[layer] = both.new_empty(*kept.shape[:3], self.capacity, kept.shape[-1])
            self._layers[layer][:, :, :, filled] = kept
