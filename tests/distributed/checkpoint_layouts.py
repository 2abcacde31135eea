"""The layouts that save and load each other's checkpoints, on both sides: a world of four ranks, and one process."""

import importlib
import json
from pathlib import Path

from sigmoe.launch.build import build_mesh
from sigmoe.launch.compose import compose_command
from sigmoe.launch.run_state import checkpoint_content, restore
from sigmoe.launch.train_config import TrainConfig
from sigmoe.launch.trainer import Trainer
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.storage.checkpoint import open_checkpoint
from sigmoe.parallel.checkpointer import Checkpointer
from sigmoe.parallel.mesh import background_axis

WORLD = 4  # processes, of which two run the layouts of two
SAVED, END = 2, 4
SINGLE = "single"
LAYOUTS = {
    "dp4": [],
    "dp4-zero2": ["parallel.zero_stage=2", "micro_batch=1"],
    "tp2": ["parallel.tp=2", "parallel.zero_stage=2"],
    "ep4": ["parallel.ep=4", "parallel.offload=cpu"],
    "tp2-ep2": ["parallel.tp=2", "parallel.ep=2", "micro_batch=2"],
    "tp2-ep4-etp1": ["parallel.tp=2", "parallel.ep=4", "parallel.etp=1"],
}
OF_TWO = {"two-ep2": ["parallel.ep=2", "parallel.zero_stage=2", "micro_batch=2"], "two-tp2": ["parallel.tp=2"]}
MODELS = {
    "gates": ["router.sets=3", "router.balance=bias", "model.qk_norm=width", "model.embedding_slots={ships: 1}"],
    "tables": ["router=rre", "router.sets=4", "model.tie_embeddings=true", "model.sparse_layers=upper:1"],
}
# An odd vocabulary is padded under tensor parallelism, never on disk.
TINY = "logger=jsonl model=tiny model.dim=16 model.expert_dim=12 model.vocab_size=331 steps=10 global_batch=8".split()
TINY += ["sequence_length=16", "schedule.warmup_steps=2", "optim.lr=3e-3", "out=nowhere"]


def pairs():
    """(model, who saved, who loads): each layout loads its own, its neighbour's and one process's checkpoints.

    Two processes also load what four saved, and four what two saved. One process loads everything, see the tests.
    """
    names = list(LAYOUTS)
    for place, name in enumerate(names):
        yield "gates", name, name
        yield "gates", names[(place + 1) % len(names)], name
        yield "gates", names[(place + 3) % len(names)], name
        yield "gates", SINGLE, name
    yield "tables", "tp2-ep2", "dp4"
    yield "tables", SINGLE, "tp2-ep4-etp1"
    yield from (("gates", SINGLE, name) for name in OF_TWO)
    yield "gates", "two-ep2", "two-ep2"
    yield "gates", "two-ep2", "two-tp2"
    yield "gates", "two-ep2", "tp2"
    yield "gates", "two-tp2", "dp4-zero2"
    yield "gates", "tp2-ep4-etp1", "two-ep2"
    yield "gates", "dp4-zero2", "two-tp2"


def savers():
    """(model, layout) of all that train without interruption."""
    return list(dict.fromkeys((model, saver) for model, saver, _ in pairs()))


def world_of(layout):
    """How many processes it takes."""
    return 1 if layout == SINGLE else 2 if layout in OF_TWO else WORLD


MESHES = {}  # the last one
BACKGROUND = {}  # its group for saves beside training


def build(model, layout, dataset, world):
    """A trainer at its first step. Neighbours of one layout share its groups."""
    opened = open_dataset(Path(dataset), check_ids=False)
    words = [*TINY, *MODELS[model], *(LAYOUTS | OF_TWO).get(layout, []), f"dataset={dataset}"]
    config = TrainConfig.load(compose_command("train", words))
    return Trainer(config, opened, mesh_of(config, opened, world))


def mesh_of(config, opened, world):
    parallel = config.parallel
    key = (parallel.tp, parallel.ep, parallel.expert_tp)
    if key not in MESHES:
        if MESHES and world.size > 1:
            importlib.import_module("sigmoe.parallel.megatron").forget_groups()
        MESHES.clear()
        BACKGROUND.clear()
        MESHES[key] = build_mesh(config, config.model.build_registry(opened.domain_names), world)
    return MESHES[key]


def advance(trainer, until):
    """Train; return losses and norms."""
    told = []
    while trainer.step < until:
        step = trainer.train_step()
        told.append([step.loss, step.grad_norm])
    return told


def begin_save(trainer, folder):
    world = trainer.mesh.world
    if world.size not in BACKGROUND:
        BACKGROUND[world.size] = background_axis(world, 200)
    checkpointer = Checkpointer(folder, keep=None, world=world, background=BACKGROUND[world.size])
    return checkpointer.begin_save(trainer.step, checkpoint_content(trainer, {}, {}))


def save(trainer, folder, at=None):
    Checkpointer(folder, keep=None, world=trainer.mesh.world).save(
        trainer.step if at is None else at, checkpoint_content(trainer, {}, {})
    )


def uninterrupted(model, layout, dataset, world, folder):
    """Train, save in the middle and at the end; return what the second half told."""
    trainer = build(model, layout, dataset, world)
    advance(trainer, SAVED)
    save(trainer, folder)
    told = advance(trainer, END)
    save(trainer, folder)
    return told


def interrupted(model, layout, dataset, world, saved, folder):
    """Load, save again beside going on, save; return what the second half told."""
    trainer = build(model, layout, dataset, world)
    restore(trainer, open_checkpoint(saved / f"step-{SAVED:08}"))
    saving = begin_save(trainer, folder)
    told = advance(trainer, END)
    saving.result()
    save(trainer, folder)
    return told


def files(folder, step):
    """The hash of every file of a checkpoint."""
    return json.loads((folder / f"step-{step:08}/manifest.json").read_text())["files"]
