"""DeepSpeed ZeRO, the only file that imports it: optimizer state (and gradients) spread over data-parallel processes.

DeepSpeed lays parameters end to end, cuts them into intervals, sums gradients into them and gathers updated
parameters. What happens to an interval is ours (`segments.py`): AdamW, the global norm, clipping, freezing, skipping.
It is driven through its optimizer class rather than `deepspeed.initialize`: the engine would round the routers' gates,
divide gradients by the number of processes, and believe in experts only inside its own layer. Dense parameters and
experts, which lie on different axes, are two such optimizers; what only one process holds needs none.

Importing it takes seconds: only runs of several processes do.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from deepspeed import init_distributed, ops
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from deepspeed.utils import logger
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

from ..moe.canonical import expected_shapes
from ..moe.model import Transformer
from ..moe.precision import wide_dtype
from .adamw import MOMENTS
from .collectives import all_reduce
from .config import ParallelConfig
from .costs import BUCKET, shares_nothing
from .engine import NamedState, OptimizerConfig, StepResult, TensorSource
from .gather import Gathered
from .local import check_source
from .mesh import Axis, Mesh
from .pieces import HeldState, Piece
from .replicated import ReplicatedShards
from .segments import Interval, SegmentAdamW, find_segments
from .shards import Sharding


class ZeroEngine:
    """Owns all parameters of a parallelised `model`, given in fp32 or fp64; with a narrower `dtype` they are rounded to
    it, but for the routers' gates, and fp32 masters are kept. See `TrainEngine`.

    A step takes `accumulation` backwards. With `experts_outside` DeepSpeed never sees the experts: every process of the
    expert-data axis keeps them in full, masters and moments too. So it is with all that only one process holds.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        config: OptimizerConfig,
        parallel: ParallelConfig,
        sharding: Sharding,
        *,
        dtype: torch.dtype = torch.float32,
        accumulation: int = 1,
        experts_outside: bool = False,
    ) -> None:
        self.model, self.mesh, self.config = model, mesh, config
        self.accumulation, self.backwards, self.loss_finite = accumulation, 0, True
        self.trains: Callable[[str], bool] = lambda name: True
        parameters = dict(model.named_parameters())
        self.buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
        expected = expected_shapes(model.config, model.registry)
        self.shapes = {name: shape for name, shape in expected.items() if name not in self.buffers}
        wide = _round(parameters, sharding, dtype)
        experts = {name: parameters[name] for name in parameters if sharding.experts(name) is not None}
        dense = {name: parameters[name] for name in parameters if name not in experts}
        self.parts: list[ZeroShards | ReplicatedShards] = []
        # Apart, so the sums of what tensor ranks replicate do not depend on their experts.
        for some, axis, withheld in ((dense, mesh.dp, False), (experts, mesh.edp, experts_outside)):
            if some and (withheld or shares_nothing(axis, parallel)):
                self.parts.append(ReplicatedShards(some, sharding, mesh, axis))
            elif some:
                self.parts.append(ZeroShards(some, sharding, mesh, axis, parallel))
        self.optimizer = SegmentAdamW([interval for part in self.parts for interval in part.intervals], config)
        self.optimizer.fill(wide)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; after a step's last one they are summed over processes."""
        assert self.backwards < self.accumulation, f"more than {self.accumulation} backwards in a step"
        self.backwards += 1
        self.loss_finite = self.loss_finite and bool(loss.detach().isfinite())
        loss.backward()  # type: ignore[no-untyped-call]
        for part in self.parts:
            part.accumulate(last=self.backwards == self.accumulation)

    def step(self, lr: float) -> StepResult:
        """Clip by the global norm and update; all skip where any loss, or the norm, is not finite."""
        assert self.backwards == self.accumulation, f"{self.backwards} backwards of {self.accumulation} in a step"
        gradients = [gradient for part in self.parts for gradient in part.gradients()]
        norm, losses_finite = self._agree(self.optimizer.square_sum(gradients, self.trains))
        skipped = not losses_finite or norm != norm or norm == float("inf")
        if not skipped:
            clip = self.config.clip_norm
            scale = clip / norm if clip is not None and norm > clip else 1.0
            self.optimizer.update(gradients, lr, scale, self.trains)
        del gradients
        for part in self.parts:
            part.forget()
            if not skipped:
                part.publish()
        self.backwards, self.loss_finite = 0, True
        return StepResult(grad_norm=norm, skipped=skipped)

    def train_only(self, trains: Callable[[str], bool]) -> None:
        """Freeze every parameter that `trains` refuses: neither gradient nor decay moves it, its moments stand."""
        if not any(trains(name) for name in self.shapes):
            raise ValueError("no parameter would train: widen the phase's train patterns")
        self.trains = trains

    def held(self) -> HeldState:
        """Return what this process holds, the memory itself; over all processes every element is there once."""
        model = list(self.optimizer.held_masters())
        if self.mesh.world.rank == 0:
            model += [_whole(name, buffer) for name, buffer in self.buffers.items()]
        return HeldState(model=tuple(model), optimizer=tuple(self.optimizer.held_moments()))

    def named_state(self) -> NamedState:
        """Return whole tensors that no process has: `write_gathered` brings them together. All call it."""
        held, world = self.held(), self.mesh.world
        return NamedState(model=Gathered(held.model, world), optimizer=Gathered(held.optimizer, world))

    def load_named_state(self, model: TensorSource, optimizer: TensorSource | None) -> None:
        """Copy in what this process holds, and read no more; without `optimizer` moments and steps start from zero.

        All processes call it together. Raises ValueError naming what is missing, left over or of another shape.
        """
        buffers = {name: tuple(buffer.shape) for name, buffer in self.buffers.items()}
        check_source(_meta(self.shapes | buffers), model)
        if optimizer is not None:
            check_source(_meta(moment_shapes(self.shapes)), optimizer)
        self.optimizer.load(model, optimizer)
        for name, buffer in self.buffers.items():
            buffer.copy_(model.read(name))
        for part in self.parts:
            part.publish()

    def _agree(self, square_sum: Tensor) -> tuple[float, bool]:
        """Return the global norm and whether every process's losses were finite, the same everywhere."""
        mine = torch.stack([square_sum, square_sum.new_tensor(0.0 if self.loss_finite else 1.0)])
        device = next(self.model.parameters()).device  # nccl sums nothing in host memory
        total = all_reduce(mine.to(device), self.mesh.world).cpu()
        return float(total[0].sqrt()), float(total[1]) == 0


class ZeroShards:
    """Named parameters under ZeRO stage 1 or 2, shared out over `axis`. Those of one dtype are one interval here.

    Gradients are reduced after each backward in the order of the parameters, not as they come: the order in which a
    backward reaches parameters depends on the batch (a rank may have no sequence of a domain), and ranks that disagree
    on it would add up different tensors, or hang. So a backward's gradients stand in full until it ends.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        sharding: Sharding,
        mesh: Mesh,
        axis: Axis,
        parallel: ParallelConfig,
    ) -> None:
        logger.setLevel(logging.WARNING)
        # DeepSpeed 0.19.8 would compile shared-memory collectives for inference here, on a CPU, and print about it.
        ops.__compatible_ops__ = {}
        init_distributed()  # torch.distributed is up: this only lets DeepSpeed find it
        self.stage, self.offloads = parallel.zero_stage, parallel.offload == "cpu"
        groups = _groups(parameters)
        self.parameters = [parameter for group in groups for parameter in group.values()]
        self.zero = _build(groups, axis, parallel)
        self.sums: list[Tensor] = []
        sizes, masters = self.zero.partition_size, self.zero.single_partition_of_fp32_groups
        self.intervals = [
            Interval(master, find_segments(group.items(), sharding, mesh, axis.rank * size, (axis.rank + 1) * size))
            for group, size, master in zip(groups, sizes, masters)
        ]

    def accumulate(self, *, last: bool) -> None:
        """Take the gradients of a backward; processes sum them now (stage 2), or after the last one of a step."""
        zero = self.zero
        if self.stage == 2 or last:
            for parameter in self.parameters:
                if parameter.grad is None and getattr(parameter, "grad_accum", None) is None:
                    parameter.grad = torch.zeros_like(parameter)
            zero.setup_buckets()
        zero.backward_epilogue()  # stage 1: narrow gradients are added to fp32 ones
        if self.stage == 2:
            self._reduce_now()
        elif last:
            zero.reduce_gradients()
            self.sums = self._take()

    def gradients(self) -> list[Tensor]:
        """Return the summed gradient of each interval, in fp32 at least."""
        return self.sums

    def publish(self) -> None:
        """Round the masters into the parameters, everywhere."""
        self.zero.update_lp_params()

    def forget(self) -> None:
        """Drop all gradients."""
        self.sums = []
        self.zero.zero_grad(set_to_none=True)

    def _reduce_now(self) -> None:
        """Sum a backward's gradients into the intervals."""
        for index, group in enumerate(self.zero.bit16_groups):
            for parameter in group:
                self.zero.reduce_ready_partitions_and_remove_grads(parameter, index)
        self.zero.overlapping_partition_gradients_reduce_epilogue()
        taken = self._take()
        for total, more in zip(self.sums, taken):
            total.add_(more)
        self.sums = self.sums or taken

    def _take(self) -> list[Tensor]:
        """Return what DeepSpeed has just reduced, and let it forget: every reduction is a step of its own to it."""
        zero = self.zero
        if self.offloads:
            zero.reset_cpu_buffers()  # after the copies to the host have arrived
            taken = [master.grad.clone() for master in zero.single_partition_of_fp32_groups]
        else:
            taken = [_flat(zero.averaged_gradients[index]) for index in range(len(self.intervals))]
        for index in range(len(self.intervals)):
            zero.averaged_gradients[index] = None
            zero.all_grad_tensors[index] = None
        zero.micro_step_id = INITIAL_MICRO_STEP_ID
        zero.zero_grad(set_to_none=True)
        return taken


class _Optimizer(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """Stages gradients in the masters' dtype: 0.19.8 would stage those of stage 2 in the first group's."""

    def _gradient_reduction_buffer_dtype(self) -> Any:
        return self.gradient_accumulation_dtype

    def _configure_master_weights(self, **settings: object) -> torch.dtype:
        """Masters of fp64 parameters are fp64: of itself 0.19.8 knows narrower ones than fp32 alone."""
        return wide_dtype(self.optimizer.param_groups[0]["params"][0].dtype)

    def create_gradient_handling_hooks(self) -> None:
        """Register none: see `ZeroShards`."""


def moment_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the optimizer's tensors of canonical parameters."""
    return {
        f"{name}.{moment}": () if moment == "step" else shape for name, shape in shapes.items() for moment in MOMENTS
    }


def _meta(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _round(parameters: Mapping[str, nn.Parameter], sharding: Sharding, dtype: torch.dtype) -> dict[str, Tensor]:
    """Round parameters, but for the routers' gates, to `dtype`; return the shards as they were, by canonical name."""
    wide: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        wide.update({shard.name: shard.tensor for shard in sharding.views(name, parameter.detach())})
        if not name.endswith("gate.weight"):
            parameter.data = parameter.data.to(dtype)
    return wide


def _whole(name: str, tensor: Tensor) -> Piece:
    shape, size = tuple(tensor.shape), tensor.numel()
    return Piece(name=name, shape=shape, dim=None, start=0, stop=0, begin=0, end=size, tensor=tensor.view(-1))


def _groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
    """Return those of each dtype; the narrow one first: DeepSpeed takes the first group's for the dtype of all."""
    groups: dict[torch.dtype, dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(parameter.dtype, {})[name] = parameter
    return [groups[dtype] for dtype in sorted(groups, key=lambda dtype: dtype.itemsize)]


def _build(groups: Sequence[dict[str, nn.Parameter]], axis: Axis, parallel: ParallelConfig) -> Any:
    # DeepSpeed takes groups from an optimizer; it never steps.
    holder = torch.optim.SGD([{"params": list(group.values())} for group in groups], lr=0.0)
    names = {parameter: name for group in groups for name, parameter in group.items()}
    total = sum(parameter.numel() for parameter in names)
    wide = wide_dtype(next(iter(names)).dtype)
    return _Optimizer(
        holder,
        names,
        timers=NoopTimer(),
        optimizer_params={},
        reduce_bucket_size=min(total, BUCKET),
        dp_process_group=axis.group,
        reduce_scatter=False,  # of what 0.19.8 calls so it all-reduces a copy of the bucket, and copies it back
        offload_optimizer_config=_offload(parallel, next(iter(names)).device),
        communication_data_type=wide,
        gradient_accumulation_dtype=wide,
        gradient_average=False,
        partition_grads=parallel.zero_stage == 2,
        check_grad_overflow=False,
    )


def _offload(parallel: ParallelConfig, device: torch.device) -> DeepSpeedZeroOffloadOptimizerConfig | None:
    if parallel.offload == "none":
        return None
    return DeepSpeedZeroOffloadOptimizerConfig(device="cpu", pin_memory=device.type == "cuda")


def _flat(parts: Any) -> Tensor:
    flat = getattr(parts, "flat_partition", None)
    return torch.cat([part.reshape(-1) for part in parts]) if flat is None else flat
