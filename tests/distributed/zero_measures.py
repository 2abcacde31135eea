"""Bytes that stand and travel, counted at tensors and collectives, beside what the formulas say."""

from contextlib import contextmanager

import torch
from deepspeed.comm import comm
from torch import distributed
from zero_cases import NAMES

from sigmoe.parallel.costs import BUCKET, footprint, traffic


def footprint_of(case, run, gradients):
    """Return the formula's bytes and those that this rank holds, by name."""
    config, part = case.config, run.engine.parts[0]
    formula = footprint(
        config, config.build_registry(NAMES), run.mesh, case.parallel, getattr(torch, case.dtype),
        accumulation=run.accumulation,
    )  # fmt: skip
    optimizer, masters = run.engine.optimizer.optimizer, part.zero.single_partition_of_fp32_groups
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = {
        "parameters": size(part.zero.bit16_groups_flat),
        "optimizer": size(masters) + size(moments),
        "buckets": min(part.zero.reduce_bucket_size, BUCKET) * 4,
        "gradients": max(gradients),
    }
    return {name: getattr(formula, name) for name in held}, held


def traffic_of(case, mesh, accumulation):
    """Return the formula's bytes, all of the data-parallel collectives together."""
    config = case.config
    told = traffic(
        config, config.build_registry(NAMES), mesh, case.parallel, getattr(torch, case.dtype),
        accumulation=accumulation,
    )  # fmt: skip
    return {
        "reduced": sum(told.reduced.values()),
        "gathered": sum(told.gathered.values()),
        "agreed": told.agreed,
    }


def measure_gradients(engine):
    """Note what stands of gradients after each backward, and after its narrow gradients were added up."""
    part, seen = engine.parts[0], []
    accumulate, epilogue = part.accumulate, part.zero.backward_epilogue

    def note():
        tensors = [getattr(p, name, None) for p in part.parameters for name in ("grad", "grad_accum")]
        seen.append(size(tensor for tensor in [*tensors, *part.sums] if tensor is not None))

    def noted_accumulate(*, last):
        note()
        accumulate(last=last)

    def noted_epilogue():
        epilogue()
        note()

    part.accumulate, part.zero.backward_epilogue = noted_accumulate, noted_epilogue
    return seen


@contextmanager
def measure_traffic(mesh):
    """Count bytes handed to collectives of the data-parallel axes, and to the world's."""
    sent = {"reduced": 0, "gathered": 0, "agreed": 0}
    data_groups = [axis.group for axis in (mesh.dp, mesh.edp) if axis.size > 1]
    reduce, gather = distributed.all_reduce, comm.cdb.all_gather_function

    def counted_reduce(tensor, *args, group=None, **kwargs):
        if any(group is other for other in data_groups):
            sent["reduced"] += tensor.nbytes
        elif group is mesh.world.group:
            sent["agreed"] += tensor.nbytes
        return reduce(tensor, *args, group=group, **kwargs)

    def counted_gather(*, output_tensor, input_tensor, group, async_op):
        if any(group is other for other in data_groups):
            sent["gathered"] += output_tensor.nbytes
        return gather(output_tensor, input_tensor, group=group, async_op=async_op)

    distributed.all_reduce, comm.cdb.all_gather_function = counted_reduce, counted_gather
    try:
        yield sent
    finally:
        distributed.all_reduce, comm.cdb.all_gather_function = reduce, gather


def size(tensors):
    return sum(tensor.nbytes for tensor in tensors)
