"""One rank of a gloo world that runs every case of its size.

    python world.py RANK WORLD FOLDER all|some

Writes `<case number>-<rank>.safetensors` (parameters and gradients held here) and `.json` (where they belong, sums).
"""

import json
import sys
import time
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
from cases import NAMES, SEQUENCES, batch, cases, finish, perturb, step
from safetensors.torch import save_file
from torch import distributed

from sigmoe.moe.batch import IGNORED
from sigmoe.parallel.config import ParallelConfig
from sigmoe.parallel.layout import check_layout
from sigmoe.parallel.megatron import build_mesh, copy, forget_groups
from sigmoe.parallel.parallelize import parallelize
from sigmoe.parallel.shards import Sharding


@cache
def mesh_of(tp, ep, etp):
    """One set of groups a layout: a gloo group costs threads, and is never given back."""
    forget_groups()
    mesh = build_mesh(ParallelConfig(tp=tp, ep=ep, etp=etp))
    check_copy(mesh.tp)
    return mesh


def check_copy(axis):
    """A strided gradient (here of an expanded sum) is summed too: Megatron-Core alone hands on one rank's."""
    x = torch.ones(3, 2, requires_grad=True)
    (copy(x, axis).sum() * (axis.rank + 1)).backward()
    assert bool((x.grad == axis.size * (axis.size + 1) / 2).all()), x.grad


def run_case(case, folder, number):
    parallel = ParallelConfig(tp=case.tp, ep=case.ep, etp=case.etp, recompute=case.recompute)
    config, registry = case.config, case.config.build_registry(NAMES)
    steps = check_layout(
        config, registry, parallel, world_size=case.world, global_batch=SEQUENCES, micro_batch=case.micro
    )
    mesh = mesh_of(case.tp, case.ep, parallel.expert_tp)
    model = parallelize(config, registry, mesh, parallel, seed=0, device=torch.device("cpu"), backends=case.backends)
    sharding = Sharding(config, registry, mesh)
    with torch.no_grad():
        for shard in sharding.all(model).values():
            if not shard.name.endswith("route_table"):
                whole = torch.zeros(shard.shape) if shard.dim is not None else shard.tensor.clone()
                if shard.name.endswith(("norm.weight", "bias")):
                    value = torch.ones(shard.shape) if shard.name.endswith("norm.weight") else whole
                    shard.tensor.copy_(shard.part(perturb(config, shard.name, value)))
    model = finish(case, model)
    whole = batch(case)
    width = mesh.dp.size * case.micro
    begins = [place * width + mesh.dp.rank * case.micro for place in range(steps)]
    micros = [whole.rows(begin, begin + case.micro) for begin in begins]
    labels = int((whole.label_BS != IGNORED).sum())
    sums, counts = step(case, model, registry, micros, labels)
    state = model.state_dict(keep_vars=False)
    gradients = reduced_gradients(model, sharding, mesh)
    tensors = {f"value.{shard.name}": shard.tensor.clone() for shard in sharding.all(model).values()}
    places, padding = {}, 0.0
    for name, gradient in gradients.items():
        for shard in sharding.views(name, gradient):
            tensors[f"gradient.{shard.name}"] = shard.tensor.clone()
        if "embed_tokens" in name or "lm_head" in name:
            padding += float(gradient[shard.stop - shard.start :].abs().sum())
    for name, tensor in state.items():
        for shard in sharding.views(name, tensor):
            places[shard.name] = [shard.dim, shard.start, shard.stop, list(shard.shape), shard.first(mesh)]
    with torch.no_grad():
        logits = model(micros[0].token_BS, start_BS=micros[0].start_BS, domain_B=micros[0].domain_B).logits_BSV
    tensors["logits"] = logits.contiguous()
    save_file(tensors, folder / f"{number}-{mesh.world.rank}.safetensors")
    answer = {"places": places, "sums": sums, "counts": counts, "padding": padding, "begin": begins[0]}
    answer["counts_once"] = mesh.tp.rank == 0
    (folder / f"{number}-{mesh.world.rank}.json").write_text(json.dumps(answer))


def reduced_gradients(model, sharding, mesh):
    """What an engine does: sums over dp, or over edp for experts."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        axis = mesh.edp if sharding.experts(name) is not None else mesh.dp
        if axis.size > 1:
            distributed.all_reduce(gradient, group=axis.group)
        gradients[name] = gradient
    return gradients


def meet(rank, world, folder):
    """A store on a port that rank 0 finds free, and names in a file."""
    named = folder / "port"
    if rank == 0:
        store = distributed.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
        named.with_suffix(".new").write_text(str(store.port))
        named.with_suffix(".new").rename(named)
        return store
    while not named.exists():
        time.sleep(0.05)
    return distributed.TCPStore("127.0.0.1", int(named.read_text()), world, is_master=False)


def main(rank, world, folder, everything):
    torch.set_num_threads(1)
    store = meet(rank, world, folder)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        for number, case in enumerate(cases(world, everything)):
            run_case(case, folder, number)
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "all")
