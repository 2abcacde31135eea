"""Before the first step: every rank runs the same code, libraries, config and data; else nothing is worth starting."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..moe.data.dataset import Dataset
from ..parallel.agreement import exchange
from ..parallel.mesh import Axis
from .train_config import TrainConfig

_LIBRARIES = ("torch", "deepspeed", "megatron-core", "sigmoe")
# Each machine may have its own; the config in `out` is compared with this one later.
_LOCAL = ("out", "dataset", "device", "threads")
_ROOT = Path(__file__).resolve().parent.parent


def check_alike(config: TrainConfig, dataset: Dataset, world: Axis) -> None:
    """Raise ValueError, on all ranks, that names the first rank and key in which ranks differ from rank 0."""
    facts = _facts(config, dataset)
    hashed = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if len(set(exchange(hashed, world))) == 1:
        return
    first, *others = exchange(facts, world)
    for rank, other in enumerate(others, 1):
        for key in [*first, *(key for key in other if key not in first)]:
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"rank {rank} differs from rank 0: {key} is {other.get(key)!r} there and {first.get(key)!r} here: "
                    "start all ranks alike"
                )


def _facts(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    facts = dict(_flat({key: value for key, value in config.to_dict().items() if key not in _LOCAL}))
    facts["the dataset's digest"] = dataset.digest
    facts |= {f"the version of {name}": _version(name) for name in _LIBRARIES}
    facts["the digest of sigmoe's code"] = _code_digest()
    return facts


def _flat(data: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _code_digest() -> str:
    digest = hashlib.sha256()
    folders = ("kernels", "moe", "parallel", "launch")
    for path in sorted(path for folder in folders for path in (_ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
