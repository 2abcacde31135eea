"""The training loop: batches in, steps and metrics out. Reads downward: one run, one step, one micro-batch.

Shape letters: B sequences, S positions, N domains, E experts.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..moe.batch import IGNORED, Batch
from ..moe.data.dataset import Dataset
from ..moe.data.loader import BatchLoader
from ..moe.data.sampling import Sampler
from ..moe.model import ModelOutput
from ..moe.routing import TrainingPass
from ..parallel.collectives import all_reduce
from ..parallel.mesh import Axis, Mesh, single_mesh
from .balance_state import BalanceState
from .build import build_engine, build_model
from .guard import StepGuard
from .kernel_choice import choose_backends
from .schedule import rate_ratio
from .train_config import TrainConfig


@dataclass(kw_only=True)
class StepMetrics:
    """Sums of one optimizer step."""

    step: int
    lr: float
    grad_norm: float = 0.0
    skipped: bool = False
    tokens: int = 0
    loss_sum_N: Tensor
    labels_N: Tensor
    aux_loss: float = 0.0
    z_loss: float = 0.0
    dropped: int = 0
    counts: dict[int, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean loss over the step's labelled tokens, nats."""
        return float(self.loss_sum_N.sum() / self.labels_N.sum().clamp(min=1))

    def sum_over(self, dp: Axis) -> None:
        """Add up the sums of ranks that saw different rows; counts are left to `BalanceState`."""
        if dp.size == 1:
            return
        scalars = torch.tensor([self.aux_loss, self.z_loss, self.dropped], dtype=torch.float64)
        N = len(self.loss_sum_N)
        total = all_reduce(torch.cat([self.loss_sum_N, self.labels_N, scalars]), dp)
        self.loss_sum_N, self.labels_N = total[:N], total[N : 2 * N]
        self.aux_loss, self.z_loss, self.dropped = float(total[-3]), float(total[-2]), int(total[-1])


class Trainer:
    """A run: model, engine, data and balance state, one optimizer step at a time.

    On a mesh each data-parallel rank takes its rows of the global batch; metrics and balance are the whole batch's.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, mesh: Mesh | None = None) -> None:
        self.config, self.dataset = config, dataset
        self.mesh = single_mesh() if mesh is None else mesh
        self.registry = config.model.build_registry(dataset.domain_names)
        sampler = Sampler(config.sample_phases(dataset.domain_names), dataset.domain_names)
        self.loader = BatchLoader(dataset, sampler, config.sequence_length, config.seed)
        self.device = torch.device(pick_device(config.device))
        self.backends = choose_backends(
            config.kernels, config.model, config.precision, self.device, expert_tp=config.parallel.expert_tp
        )
        self.model = build_model(config, self.registry, dataset, self.mesh, self.device, self.backends)
        self.engine = build_engine(config, self.model, self.mesh)
        self._check_phases()
        self.balance = BalanceState(self.model, self.mesh.dp)
        self.load_NE = {layer: torch.zeros_like(count) for layer, count in self.balance.counts.items()}
        self.guard = StepGuard(config.guard)
        self.step, self.skipped = 0, 0

    def train_step(self) -> StepMetrics:
        """Run the next optimizer step. All ranks call it."""
        config, step = self.config, self.step
        trains = _accepts(config.phases[config.phase_at(step)].train)
        self.engine.train_only(trains)
        lr = config.optim.lr * rate_ratio(config.schedule, step, config.steps)
        zeros_N = torch.zeros(len(self.registry.domains), dtype=torch.float64)
        metrics = StepMetrics(step=step + 1, lr=lr, loss_sum_N=zeros_N.clone(), labels_N=zeros_N.clone())
        dp, tokens = self.mesh.dp, config.global_batch * config.sequence_length
        share, size = config.global_batch // dp.size, config.micro_size(dp.size)
        first = step * config.global_batch + dp.rank * share
        batch = self.loader.batch(range(first, first + share))
        labels = max(int(all_reduce(torch.tensor(batch.num_labels), dp)), 1)
        for begin in range(0, share, size):
            micro = batch.rows(begin, begin + size)
            output = self._forward(micro, step)
            self.engine.backward(self._objective(output, labels, tokens, metrics))
            self._count(micro, output, metrics)
        result = self.engine.step(lr)
        metrics.grad_norm, metrics.skipped, metrics.tokens = result.grad_norm, result.skipped, tokens
        metrics.sum_over(dp)
        metrics.counts = self.balance.finish_step(skipped=result.skipped, trains=trains)
        for layer, count_NE in metrics.counts.items():
            self.load_NE[layer] += count_NE
        self.skipped += result.skipped
        self.step += 1
        return metrics

    def _forward(self, micro: Batch, step: int) -> ModelOutput:
        here = micro.to(self.device)
        training = TrainingPass(seed=self.config.seed, step=step, fractions=self.balance.fractions)
        output: ModelOutput = self.model(
            here.token_BS,
            start_BS=here.start_BS,
            domain_B=micro.domain_B,
            sample_B=here.sample_B,
            label_BS=here.label_BS,
            training=training,
        )
        return output

    def _objective(self, output: ModelOutput, labels: int, tokens: int, metrics: StepMetrics) -> Tensor:
        """Loss over the global batch's labels, plus the balance losses: means over sparse layers and its tokens."""
        assert output.loss_sum is not None
        loss = output.loss_sum / labels
        if output.stats:
            router, share = self.config.model.router, 1 / (len(output.stats) * tokens)
            aux = torch.stack([stats.balance_sum for stats in output.stats]).sum() * share
            z = torch.stack([stats.z_sum for stats in output.stats]).sum() * share
            loss = loss + router.auxiliary_loss * aux + router.z_loss * z
            metrics.aux_loss += float(aux.detach())
            metrics.z_loss += float(z.detach())
        return loss

    def _count(self, micro: Batch, output: ModelOutput, metrics: StepMetrics) -> None:
        assert output.loss_BS is not None
        metrics.loss_sum_N.index_add_(0, micro.domain_B, output.loss_BS.double().sum(1).cpu())
        metrics.labels_N.index_add_(0, micro.domain_B, (micro.label_BS != IGNORED).sum(1).double())
        metrics.dropped += sum(int(stats.dropped) for stats in output.stats)
        self.balance.add(output.stats, micro.domain_B)

    def _check_phases(self) -> None:
        """Raise ValueError now for what would stop the run when the phase begins: patterns that match nothing."""
        for number, phase in enumerate(self.config.phases):
            for patterns in [phase.train, *((pattern,) for pattern in phase.train)]:
                try:
                    self.engine.train_only(_accepts(patterns))
                except ValueError as error:
                    raise ValueError(f"phases[{number}].train={list(patterns)}: {error}") from error


def _accepts(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def pick_device(name: str) -> str:
    """Resolve `auto`; raise ValueError for cuda without a GPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU: use device=cpu or device=auto")
    return name
