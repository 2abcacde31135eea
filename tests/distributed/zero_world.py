"""One rank of a gloo world that trains every case of its size under ZeRO, then loads what they saved.

python zero_world.py RANK WORLD FOLDER [PART OF A CASE'S NAME]
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from collective_counter import CollectiveCounter, plain
from routed_rows import watch_rows
from safetensors.torch import load_file, save_file
from torch import distributed
from zero_cases import NAMES, SEQUENCES, STEPS, batch_of, gathered, labels_of, reloads, start, train_step, zero_cases
from zero_measures import footprint_of, measure_gradients, traffic_of

from sigmoe.parallel.layout import check_layout
from sigmoe.parallel.megatron import build_mesh, forget_groups
from sigmoe.parallel.parallelize import parallelize
from sigmoe.parallel.shards import Sharding
from sigmoe.parallel.zero import ZeroEngine


class Run:
    """A case on this rank."""

    def __init__(self, case):
        config, registry, parallel = case.config, case.config.build_registry(NAMES), case.parallel
        self.case = case
        self.accumulation = check_layout(
            config, registry, parallel, world_size=case.world, global_batch=SEQUENCES, micro_batch=case.micro
        )
        self.mesh = build_mesh(parallel)
        self.model = start(case, parallelize(config, registry, self.mesh, parallel, seed=0, device=torch.device("cpu")))
        self.rows = watch_rows(self.model)
        self.sharding = Sharding(config, registry, self.mesh)
        self.engine = ZeroEngine(
            self.model,
            self.mesh,
            case.optim,
            parallel,
            self.sharding,
            dtype=getattr(torch, case.dtype),
            accumulation=self.accumulation,
            experts_outside=case.outside,
        )
        self.answer = {"losses": [], "norms": [], "skipped": [], "counts_once": self.mesh.tp.rank == 0, "places": {}}
        self.tensors = {}

    def step(self, number):
        whole, micro = batch_of(self.case, number), self.case.micro
        first = self.mesh.dp.rank * self.accumulation * micro
        micros = [whole.rows(first + k * micro, first + (k + 1) * micro) for k in range(self.accumulation)]
        poisoned = number == 1 and self.case.poison == self.mesh.world.rank
        loss, result = train_step(
            self.case, self.model, self.engine, micros, labels_of(whole), whole.token_BS.numel(), number,
            poisoned=poisoned, pause=self.pause,
        )  # fmt: skip
        self.answer["losses"].append(loss)
        self.answer["norms"].append(result.grad_norm)
        self.answer["skipped"].append(result.skipped)

    def pause(self):
        if self.case.slow == self.mesh.world.rank:
            time.sleep(0.1)

    def keep(self, kind, pieces):
        """Name pieces by number, and note their places."""
        places = self.answer["places"].setdefault(kind, [])
        for number, piece in enumerate(pieces):
            places.append([piece.name, piece.shape, piece.dim, piece.start, piece.stop, piece.begin, piece.end])
            self.tensors[f"{kind}.{number}"] = piece.tensor.clone()

    def keep_state(self):
        held = self.engine.held()
        self.keep("model", held.model)
        self.keep("optimizer", held.optimizer)
        self.answer["published"] = self.published()

    def published(self):
        """Whether the parameters are the rounded masters, where this rank has them."""
        shards = self.sharding.all(self.model)
        return all(
            torch.equal(
                shards[segment.shard.name].tensor.flatten()[segment.begin : segment.end],
                master.to(shards[segment.shard.name].tensor.dtype),
            )
            for _, segment, master in self.engine.optimizer.entries()
        )

    def write(self, folder, stem):
        save_file(self.tensors, folder / f"{stem}-{self.mesh.world.rank}.safetensors")
        (folder / f"{stem}-{self.mesh.world.rank}.json").write_text(json.dumps(self.answer))
        distributed.barrier()
        forget_groups()


def run_case(case, folder, number):
    run = Run(case)
    gradients = watch_gradients(run.engine)
    measured = measure_gradients(run.engine)
    for step in range(STEPS - 1):
        run.step(step)
    run.rows.clear()
    with CollectiveCounter(run.mesh) as counter:
        run.step(STEPS - 1)
    run.answer |= {"sent": plain(counter.sent), "traffic": traffic_of(case, run)}
    run.answer["rows"] = [note["rows"] for note in run.rows]
    run.answer["footprint"], run.answer["held_bytes"] = footprint_of(case, run, measured)
    run.keep("gradient", gradients)
    run.keep_state()
    run.step(STEPS)
    run.keep("next", run.engine.held().model)
    run.write(folder, f"zero{number}")


def run_reload(source, case, folder, number):
    """Load what a case saved after its steps, and go on."""
    stem = f"zero{zero_cases(case.world).index(source)}"
    results = [
        (json.loads((folder / f"{stem}-{rank}.json").read_text()), load_file(folder / f"{stem}-{rank}.safetensors"))
        for rank in range(case.world)
    ]
    run = Run(case)
    model, optimizer = Source(gathered(results, "model")), Source(gathered(results, "optimizer"))
    run.engine.load_named_state(model, optimizer)
    run.keep_state()
    entries = list(run.engine.optimizer.entries())
    # Of a run's first and last row a little more than is wanted is read.
    spare = sum(2 * max(segment.shard.shape[1:], default=0) for _, segment, _ in entries)
    wanted = sum(master.numel() for _, _, master in entries) + spare
    buffers = sum(buffer.numel() for buffer in run.engine.buffers.values())
    run.answer["elements_read"] = model.elements + optimizer.elements
    run.answer["elements_wanted"] = 3 * wanted + len(entries) + buffers
    run.step(STEPS)
    run.keep("next", run.engine.held().model)
    run.write(folder, f"reload{number}")


class Source:
    """Named tensors in memory; counts what is read."""

    def __init__(self, tensors):
        self.tensors, self.elements = tensors, 0

    def names(self):
        return self.tensors.keys()

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name):
        return self.read_slice(name, ())

    def read_slice(self, name, slices):
        tensor = self.tensors[name][tuple(slices)].contiguous()
        self.elements += tensor.numel()
        return tensor


def watch_gradients(engine):
    """Keep the pieces of the first step's gradients that this rank counts."""
    kept, square_sum = [], engine.optimizer.square_sum

    def watched(gradients, trains):
        if not kept:
            for interval, gradient in zip(engine.optimizer.intervals, gradients):
                for segment in interval.segments:
                    if interval.counts(segment):
                        kept.append(segment.piece(segment.of(gradient).clone()))
        return square_sum(gradients, trains)

    engine.optimizer.square_sum = watched
    return kept


def main(rank, world, folder, part=""):
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "rendezvous"), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        for number, case in enumerate(zero_cases(world)):
            if part in case.name:
                print(case.name, flush=True)
                run_case(case, folder, number)
        for number, (source, case) in enumerate(reloads(world)):
            if not part:
                print("reload", source.name, case.name, flush=True)
                run_reload(source, case, folder, number)
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
