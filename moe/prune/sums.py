"""What one pass over calibration text leaves: raw sums by expert, from which every criterion and budget is computed.

Raw, because another criterion or budget then costs no second pass. They are stored as `sums.safetensors`, `sums.json`
and a manifest that vouches for both.

Shape letters: E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..storage.checkpoint import encode_json, read_manifest, verify_files, write_manifest
from ..storage.durable import DurableDirectory, durable_directory
from ..storage.tensor_reader import TensorReader
from ..storage.tensors import TensorFile, named_tensors, write_tensor_file
from ..stored import read_json

FORMAT_VERSION = 1
MOST_ENUMERATED = 8  # experts of a layer: above, its 2^E subsets are too many to try
_FILE = "sums.json"
_STEM = "sums"


@dataclass(frozen=True, kw_only=True)
class LayerSums:
    """Sums over the calibration tokens of one sparse layer.

    Of those routed to e, f is the expert's output and g its weight: after the softmax, and after the renormalisation
    where the model has one. h is the residual stream before and after the sparse layer.
    """

    tokens: int
    count_E: Tensor  # int64, tokens routed to e
    gate_E: Tensor  # float64, sum of g
    norm_E: Tensor  # float64, sum of |f|, the L2 norm
    gate_norm_E: Tensor  # float64, sum of g |f|
    easy_ep_E: Tensor  # float64, sum of g |f| max(1 - cos(h before, h after), 0)
    prob_EE: Tensor  # float64, over all tokens: sum of p_e p_f, p being the softmax over all experts
    # float64 [2^E]: sum over all tokens of |F - F_S|^2, F being the sparse layer's output and F_S the one with the
    # experts S alone, routed anew. Bit e of the index says that S has e; infinite where S has fewer than top_k.
    subset_error: Tensor | None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.count_E)

    def pack(self) -> Tensor:
        """Return all sums as one float64 vector: counts are exact in it below 2^53."""
        parts = [torch.tensor([self.tokens]), *self.tensors().values()]
        return torch.cat([part.double().flatten() for part in parts])

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by the name of its field."""
        names = ("count_E", "gate_E", "norm_E", "gate_norm_E", "easy_ep_E", "prob_EE", "subset_error")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @staticmethod
    def unpack(vector: Tensor, num_experts: int) -> "LayerSums":
        """Return what `pack` made a vector of."""
        tokens, count_E, gate_E, norm_E, gate_norm_E, easy_ep_E, prob_N, error = torch.split(
            vector, [1, *[num_experts] * 5, num_experts**2, len(vector) - 1 - 5 * num_experts - num_experts**2]
        )
        return LayerSums(
            tokens=int(tokens),
            count_E=count_E.long(),
            gate_E=gate_E,
            norm_E=norm_E,
            gate_norm_E=gate_norm_E,
            easy_ep_E=easy_ep_E,
            prob_EE=prob_N.view(num_experts, num_experts),
            subset_error=error if len(error) else None,
        )


@dataclass(frozen=True, kw_only=True)
class CalibrationSums:
    """The sums of every sparse layer, of which model (`model_identity`) and of what text (plain JSON data)."""

    model: str
    text: Mapping[str, Any]
    layers: tuple[LayerSums, ...]


def save_sums(path: Path, sums: CalibrationSums) -> None:
    """Write the directory `path`, whole or not at all; ValueError where it exists, WriteError if the disk refuses."""
    with durable_directory(path) as directory:
        _write(directory, sums)
        write_manifest(directory, ())


def load_sums(path: Path) -> CalibrationSums:
    """Read what `save_sums` wrote, every byte of it hashed; ValueError in one line where it is damaged or none."""
    if not (path / _FILE).is_file():
        raise ValueError(f"{path} holds no calibration sums (no {_FILE}): give the directory that a calibration wrote")
    verify_files(path, read_manifest(path), lambda done, total: None)
    data = read_json(path / _FILE)
    if data.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path / _FILE}: the format version must be {FORMAT_VERSION}: calibrate again")
    reader = TensorReader(path, _STEM)
    names = set(reader.names())
    layers = []
    for index, tokens in enumerate(data["tokens"]):
        prefix = f"layers.{index}."
        tensors = {name.removeprefix(prefix): reader.read(name) for name in sorted(names) if name.startswith(prefix)}
        layers.append(LayerSums(tokens=tokens, **{"subset_error": None, **tensors}))  # type: ignore[arg-type]
    return CalibrationSums(model=data["model"], text=data["text"], layers=tuple(layers))


def _write(directory: DurableDirectory, sums: CalibrationSums) -> None:
    tensors = {
        f"layers.{index}.{name}": tensor.contiguous()
        for index, layer in enumerate(sums.layers)
        for name, tensor in layer.tensors().items()
    }
    write_tensor_file(directory, ".", TensorFile(f"{_STEM}.safetensors", tuple(tensors)), named_tensors(tensors))
    data = {
        "format_version": FORMAT_VERSION,
        "model": sums.model,
        "text": dict(sums.text),
        "tokens": [layer.tokens for layer in sums.layers],
    }
    directory.write(_FILE, encode_json(data))
