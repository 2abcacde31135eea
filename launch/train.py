"""`sigmoe train`: trains a model; a run that was interrupted goes on where its newest good checkpoint stands."""

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ..moe.counts import count_parameters
from ..moe.data.dataset import Dataset, open_dataset
from ..moe.parsing import from_mapping
from ..moe.storage.durable import remove_stale, write_file
from ..parallel.agreement import together
from ..parallel.config import ParallelConfig
from ..parallel.mesh import Axis, single_mesh
from .build import build_mesh
from .cluster import Peers
from .console import progress_sink
from .initial import load_initial
from .kernel_choice import backends_note
from .launcher import Cluster, launch_command
from .layout_costs import layout_note
from .main import main
from .memory_check import check_memory
from .preflight import check_alike
from .progress import TrainProgress
from .report import print_closing_table
from .run_directory import alone_in, check_directory, check_shared
from .session import Session, SessionResult
from .stop import StopRequest
from .train_config import TrainConfig
from .trainer import Trainer
from .watchdog import Watchdog


def run(config: Mapping[str, Any], peers: Peers | None) -> None:
    """Train as `config` (composed plain data) says. Raises ValueError for a user's mistake, with nothing written.

    Under a launcher all ranks call it, and raise what one of them raises.
    """
    cluster = None if peers is None else peers.cluster
    parallel = from_mapping(ParallelConfig, config.get("parallel", {}), "parallel")
    stop = StopRequest(several=cluster is not None)
    with stop.listening():
        world = single_mesh().world if peers is None else peers.join(parallel)
        watchdog = Watchdog(cluster, parallel.watch_seconds)
        with watchdog.watching():
            _train(config, cluster, world, stop, watchdog)


def _train(
    config: Mapping[str, Any], cluster: Cluster | None, world: Axis, stop: StopRequest, watchdog: Watchdog
) -> None:
    with together(world):
        dataset = _open(config, check_ids=world.rank == 0)
        train_config = TrainConfig.load(_with_vocabulary(config, dataset))
        directory = Path(train_config.out).expanduser()
        check_directory(directory, train_config)
    check_alike(train_config, dataset, world)
    parallel, watchdog.directory = train_config.parallel, directory
    if train_config.threads is not None:
        torch.set_num_threads(train_config.threads)
    registry = train_config.model.build_registry(dataset.domain_names)
    _check_launch(parallel, world)
    mesh = build_mesh(train_config, registry, world)
    with together(world):
        check_memory(train_config, registry, mesh, 1 if cluster is None else cluster.local_size)
    progress = TrainProgress(plain_every=train_config.logger.every, silent=world.rank > 0)
    stop.say = progress.urgent
    with alone_in(directory, world, patience=parallel.join_timeout, tell=progress.note):
        with together(world):
            begun = check_directory(directory, train_config)  # again: whoever had it may have begun it
        check_shared(directory, world)
        session = Session(Trainer(train_config, dataset, mesh), directory, progress, stop, watchdog)
        _go_on(session, begun=begun)


def _go_on(session: Session, *, begun: bool) -> None:
    """Train from where the run stands; `begun`: some of it is there."""
    trainer, directory, progress, world = session.trainer, session.directory, session.progress, session.world
    config, parallel, mesh = trainer.config, trainer.config.parallel, trainer.mesh
    resumed = session.resume()
    if config.initial is not None and not resumed:
        load_initial(trainer, config.initial)
        progress.note(f"beginning with the weights of {config.initial}")
    if world.size == 1 and (parallel.zero_stage, parallel.offload) != (1, "none"):
        progress.note("one process owns the optimizer whole: parallel.zero_stage and parallel.offload change nothing")
    if begun and not resumed:
        progress.note(f"{directory} has no checkpoint yet: starting at step 0")
    if trainer.step >= config.last_step and not session.lacks_evaluation:
        if session.after and world.rank == 0:
            print_closing_table(trainer, session.before, session.after)
        limit = "steps" if trainer.step >= config.steps else "stop_at"
        progress.note(f"{directory} stands at step {trainer.step} already: raise {limit}, or give another out=")
        return
    with together(world):
        if world.rank == 0:
            remove_stale(directory)
            write_file(directory / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False).encode())
    ranks = f"{world.size} ranks, " if world.size > 1 else ""
    count = count_parameters(config.model, trainer.registry)
    progress.note(
        f"{count.total:,} parameters, {count.active:,} active a token; {len(trainer.dataset.domain_names)} domains; "
        f"{ranks}{trainer.device}, {torch.get_num_threads()} threads; run directory {directory}"
    )
    if note := backends_note(config.kernels, trainer.backends, trainer.device):
        progress.note(note)
    if world.size > 1:
        progress.note(layout_note(config, trainer.registry, mesh, trainer.device.type))
    result = session.run()
    if world.rank == 0:
        _close(session, result, progress)


def _open(config: Mapping[str, Any], *, check_ids: bool) -> Dataset:
    path = config.get("dataset")
    if not isinstance(path, str):
        raise ValueError(f"dataset must be the path of a prepared dataset, got {path!r}")
    dataset = open_dataset(Path(path).expanduser(), check_ids=False)
    if check_ids:
        with progress_sink(transient=True) as progress:
            dataset.check_ids(progress)
    return dataset


def _with_vocabulary(config: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    """Fill in the dataset's vocabulary where the model leaves it open; refuse one that is too small."""
    data = dict(config)
    model = data.get("model")
    if not isinstance(model, Mapping):
        raise ValueError(f"model must be a group of keys, got {model!r}")
    vocabulary = model.get("vocab_size")
    if vocabulary is None:
        data["model"] = {**model, "vocab_size": dataset.vocab_size}
    elif isinstance(vocabulary, int) and vocabulary < dataset.vocab_size:
        raise ValueError(
            f"model.vocab_size is {vocabulary}, but the dataset has token ids up to {dataset.vocab_size - 1}: "
            f"set it to at least {dataset.vocab_size}, or null"
        )
    return data


def _check_launch(parallel: ParallelConfig, world: Axis) -> None:
    """Raise ValueError where one process is to do what takes several."""
    if world.size == 1 and max(parallel.tp, parallel.ep) > 1:
        fewest = math.lcm(parallel.tp, parallel.ep * parallel.expert_tp)
        raise ValueError(
            f"parallel.tp={parallel.tp} parallel.ep={parallel.ep} takes {fewest} processes: "
            f"{launch_command(fewest, 'train')}"
        )


def _close(session: Session, result: SessionResult, progress: TrainProgress) -> None:
    trainer = session.trainer
    whose = "this machine's" if trainer.mesh.world.size == 1 else "each rank's"
    if session.after:
        print_closing_table(trainer, session.before, session.after)
    if result.seconds:
        progress.note(
            f"{result.tokens:,} tokens in {result.seconds:.0f} s of training, {result.tokens / result.seconds:,.0f} "
            f"tokens/s; {whose} matmul rate {result.matmul_rate / 1e9:.0f} GFLOP/s"
        )
    if trainer.skipped:
        progress.note(f"{trainer.skipped} of {trainer.step} steps were skipped: loss or gradient was not finite")
    if not session.after and not result.interrupted:
        progress.note(f"stopped at step {trainer.step} (stop_at), saved; to go on, raise stop_at or leave it out")
    elif not session.after:
        command = shlex.join(["sigmoe", "train", *sys.argv[2:]]) if sys.argv[1:2] == ["train"] else "the same command"
        what = "saved" if session.saves.saved_step is not None else "before there was anything to save"
        progress.note(f"stopped at step {trainer.step}, {what}; to resume, run again: {command}")


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
