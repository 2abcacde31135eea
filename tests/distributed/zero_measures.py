"""Bytes that stand and travel, counted at tensors and collectives, beside what the formulas say."""

import torch
from collective_counter import plain
from routed_rows import micro_batches
from zero_cases import NAMES

from sigmoe.parallel.costs import BUCKET, footprint
from sigmoe.parallel.replicated import ReplicatedShards
from sigmoe.parallel.traffic import step_traffic
from sigmoe.parallel.zero import ZeroShards


def footprint_of(case, run, gradients):
    """Return the formula's bytes and those that this rank holds, by name."""
    config, parts, optimizer = case.config, run.engine.parts, run.engine.optimizer
    formula = footprint(
        config, config.build_registry(NAMES), run.mesh, case.parallel, getattr(torch, case.dtype),
        accumulation=run.accumulation, experts_outside=case.outside,
    )  # fmt: skip
    shared = [part.zero for part in parts if isinstance(part, ZeroShards)]
    whole = [parameter for part in parts if isinstance(part, ReplicatedShards) for parameter in part.parameters]
    masters = [interval.master for interval in optimizer.intervals]
    moments = [state[name] for state in optimizer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    state = run.engine.held()
    held = {
        "snapshot": sum(piece.tensor.nbytes for piece in (*state.model, *state.optimizer)),
        "parameters": size([flat for zero in shared for flat in zero.bit16_groups_flat] + whole),
        "optimizer": size(masters + whole) - size(whole) + size(moments),  # a parameter may be its own master
        # By setting: a bucket lives only while gradients are summed.
        "buckets": sum(min(zero.reduce_bucket_size, BUCKET) * masters[0].itemsize for zero in shared),
        "gradients": max(gradients),
    }
    return {name: getattr(formula, name) for name in held}, held


def traffic_of(case, run):
    """Return the formula's bytes for the micro-batches that `run` has noted."""
    return plain(
        step_traffic(
            case.config, case.config.build_registry(NAMES), run.mesh, case.parallel, getattr(torch, case.dtype),
            micro_batches(run.rows), experts_outside=case.outside,
        )
    )  # fmt: skip


def measure_gradients(engine):
    """Note what stands of gradients when a backward ends, and whenever some of it was added up."""
    seen = []

    def note():
        parameters = [parameter for part in engine.parts for parameter in part.parameters]
        own = [getattr(parameter, name, None) for parameter in parameters for name in ("grad", "grad_accum")]
        sums = [total for part in engine.parts for total in [*part.sums, *getattr(part, "wide", {}).values()]]
        seen.append(size(tensor for tensor in [*own, *sums] if tensor is not None))

    def noting(function):
        def noted(**settings):
            note()
            function(**settings)
            note()

        return noted

    for part in engine.parts:
        part.accumulate = noting(part.accumulate)
        if isinstance(part, ZeroShards):
            part.zero.backward_epilogue = noting(part.zero.backward_epilogue)
    return seen


def size(tensors):
    """Bytes of tensors; one memory counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
