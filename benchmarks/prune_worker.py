"""A process that prunes a model by stored sums once a request, as `sigmoe prune` does it after its start-up."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..moe.extract import SubmodelWriter
from ..moe.identity import model_identity
from ..moe.prune.budget import Budget, choose_experts
from ..moe.prune.criteria import saliency
from ..moe.prune.plan import plan_pruned
from ..moe.prune.report import describe_pruning
from ..moe.prune.sums import load_sums
from ..moe.storage.checkpoint import encode_json, write_manifest
from ..moe.storage.resumable import resumable_directory
from ..moe.stored import PRUNING, open_model
from .worker import serve


@dataclass(frozen=True, kw_only=True)
class PruneRequest:
    """What to prune, by which sums, and where to."""

    contender: str
    model: str
    sums: str
    out: str
    keep: float
    hash_tensors: bool
    threads: int
    warmup: int  # 0: the process is fresh


@dataclass(frozen=True, kw_only=True)
class PruneAnswer:
    """Of one prune: seconds, also of CPU over all threads, bytes read from files, the most bytes this process held."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes_read: int = 0
    peak_bytes: int = 0


def main() -> None:
    """Serve requests until stdin ends."""
    serve(PruneRequest, _prepare)


def _prepare(request: PruneRequest) -> Callable[[int], PruneAnswer]:
    return lambda count: _measure(request) if count else PruneAnswer()


def _measure(request: PruneRequest) -> PruneAnswer:
    before, begin, cpu = _bytes_read(), time.perf_counter(), time.process_time()
    _prune(request)
    return PruneAnswer(
        seconds=time.perf_counter() - begin,
        cpu_seconds=time.process_time() - cpu,
        bytes_read=_bytes_read() - before,
        peak_bytes=_peak_bytes(),
    )


def _prune(request: PruneRequest) -> None:
    parent, sums = open_model(Path(request.model)), load_sums(Path(request.sums))
    identity, values = model_identity(parent), saliency(sums.layers, "reap")
    kept = choose_experts(values, Budget(keep=request.keep), parent.config)
    pruned = plan_pruned(parent.config, parent.registry, kept)
    writer = SubmodelWriter(parent, pruned, hash_tensors=request.hash_tensors)
    with resumable_directory(Path(request.out), {"parent": identity, "kept": kept}) as directory:
        extraction = writer.write(directory)
        report = describe_pruning(
            parent,
            identity,
            pruned,
            extraction,
            directory.records,
            kept=kept,
            saliency=values,
            sums=sums,
            groups=None,
        )
        directory.write(PRUNING, encode_json(report))
        write_manifest(directory, pruned.pieces)


def _bytes_read() -> int:
    """What this process has read from files and pipes (Linux)."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def _peak_bytes() -> int:
    """The most memory this process ever held; `ru_maxrss` would begin at what the one that started it held."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)["VmHWM"].split()[0])


if __name__ == "__main__":
    main()
