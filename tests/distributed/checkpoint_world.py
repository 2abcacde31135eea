"""One rank of a gloo world that saves and loads checkpoints under all layouts.

    python checkpoint_world.py RANK WORLD FOLDER DATASET

Rank 0 writes `<model>/<saver>/` and `<model>/<saver>-<loader>/` (checkpoints) and `told.json` (losses and norms).
"""

import itertools
import json
import random
import resource
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from checkpoint_layouts import BACKGROUND, MESHES, build, interrupted, pairs, save, savers, uninterrupted, world_of
from collective_counter import CollectiveCounter, plain
from routed_rows import micro_batches, watch_rows
from torch import distributed

from sigmoe.launch.layout_costs import loop_traffic
from sigmoe.moe.storage.durable import DurableDirectory, WriteError
from sigmoe.moe.storage.tensors import NamedTensor, write_tensors
from sigmoe.parallel.agreement import exchange, together
from sigmoe.parallel.gather import Gathered, write_gathered
from sigmoe.parallel.megatron import forget_groups
from sigmoe.parallel.mesh import Axis
from sigmoe.parallel.pieces import Piece
from sigmoe.parallel.traffic import step_traffic


def run_layouts(world, folder, dataset, *, after_more=False):
    """Run what takes so many processes; `after_more`: only what loads what more processes have saved."""
    told = {}
    for model, saver in savers():
        if world_of(saver) == world.size and not after_more:
            told[f"{model}/{saver}"] = uninterrupted(model, saver, dataset, world, folder / model / saver)
    for model, saver, loader in pairs():
        if world_of(loader) == world.size and (world_of(saver) > world.size) == after_more:
            name = f"{model}/{saver}-{loader}"
            told[name] = interrupted(model, loader, dataset, world, folder / model / saver, folder / name)
    return told


def run_traffic(world, dataset):
    """Count what a step of the trainer sends; return it by rank, beside the formulas."""
    answer = {}
    for layout in ("dp4-zero2", "tp2-ep2", "tp2-ep4-etp1"):
        trainer = build("gates", layout, dataset, world)
        notes = watch_rows(trainer.model)
        with CollectiveCounter(trainer.mesh) as counter:
            trainer.train_step()
        config, registry, mesh = trainer.config, trainer.registry, trainer.mesh
        formula = step_traffic(
            config.model, registry, mesh, config.parallel, torch.float32, micro_batches(notes)
        ) + loop_traffic(config, registry, mesh)
        answer[layout] = exchange([plain(counter.sent), plain(formula)], world)
    return answer


def run_failures(world, folder, dataset):
    """Fill the disk of one rank after the other in the midst of a save; return what all of them then raise."""
    trainer, told = build("gates", "tp2-ep2", dataset, world), {}
    save(trainer, folder / "full", at=1)
    for unlucky in range(world.size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if world.rank == unlucky:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        try:
            save(trainer, folder / "full", at=2)
            line = None
        except WriteError as error:
            line = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        left = sorted(path.name for path in (folder / "full").iterdir())
        told[unlucky] = {"lines": exchange(line, world), "left": left}
    save(trainer, folder / "full", at=3)
    return told


def run_pieces(world, folder):
    """Cut random tensors at random among the ranks; write them together, and rank 0 alone as well."""
    chooser, tensors, pieces = random.Random(1), {}, []
    for number in range(40):
        shape = tuple(chooser.randint(1, 9) for _ in range(chooser.choice((0, 1, 2, 2, 3))))
        dtype = chooser.choice((torch.float32, torch.int32, torch.bfloat16))
        name = f"layers.{number}.weight"
        tensors[name] = torch.arange(max(1, torch.Size(shape).numel())).view(shape).to(dtype) + number
        dim = chooser.choice((None, 0, 1)) if len(shape) > 1 else None
        cuts = [0, shape[dim]] if dim is not None else [0, 1]
        if dim is not None:
            cuts += [chooser.randint(0, shape[dim]) for _ in range(2)]
        for start, stop in itertools.pairwise(sorted(set(cuts))):
            box = tensors[name] if dim is None else tensors[name].narrow(dim, start, stop - start)
            flat = box.reshape(-1)
            ends = sorted({0, *(chooser.randint(0, flat.numel()) for _ in range(3)), flat.numel()})
            for begin, end in itertools.pairwise(ends):
                held = Piece(
                    name=name, shape=shape, dim=dim, start=start, stop=stop, begin=begin, end=end,
                    tensor=flat[begin:end].clone(),
                )  # fmt: skip
                if chooser.randrange(world.size) == world.rank:
                    pieces.append(held)
    together_, alone = DurableDirectory(folder / "together"), DurableDirectory(folder / "alone")
    with together(world):
        if world.rank == 0:
            together_.root.mkdir()
            alone.root.mkdir()
    write_gathered(together_, {"model": Gathered(pieces, world)}, world, max_file_bytes=300)
    records = [record for some in exchange(together_.records, world) for record in some.items()]
    if world.rank == 0:
        named = {name: NamedTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
        write_tensors(alone, "model", "model", named, max_file_bytes=300)
        assert len(records) == len(alone.records)
        assert {name: tuple(record) for name, record in records} == alone.records
    return len(records)


@contextmanager
def world_of_size(size, rank, folder, name):
    """The first `size` ranks as a world, for a while."""
    store = distributed.FileStore(str(folder / f"rendezvous-{name}"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=200))
    try:
        yield Axis(group=distributed.group.WORLD, rank=rank, size=size)
    finally:
        MESHES.clear()
        BACKGROUND.clear()
        forget_groups()
        distributed.destroy_process_group()


def main(rank, size, folder, dataset):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    answer, losses = {}, {}
    if rank < 2:
        with world_of_size(2, rank, folder, "before") as world:
            losses |= run_layouts(world, folder, dataset)
    with world_of_size(size, rank, folder, "all") as world:
        answer["files"] = run_pieces(world, folder)
        losses |= run_layouts(world, folder, dataset)
        answer |= {"traffic": run_traffic(world, dataset), "failures": run_failures(world, folder, dataset)}
    if rank < 2:
        with world_of_size(2, rank, folder, "after") as world:
            losses |= run_layouts(world, folder, dataset, after_more=True)
    if rank == 0:
        (folder / "told.json").write_text(json.dumps(answer | {"losses": losses}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
