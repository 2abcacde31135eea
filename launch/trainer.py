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
from ..moe.initialize import initialize
from ..moe.model import ModelOutput, Transformer
from ..moe.route_table import fill_route_tables
from ..moe.routing import TrainingPass
from ..parallel.engine import TrainEngine
from ..parallel.local import LocalEngine
from .balance_state import BalanceState
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


class Trainer:
    """One process's run: model, engine, data and balance state, one optimizer step at a time."""

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        self.config, self.dataset = config, dataset
        self.registry = config.model.build_registry(dataset.domain_names)
        sampler = Sampler(config.sample_phases(dataset.domain_names), dataset.domain_names)
        self.loader = BatchLoader(dataset, sampler, config.sequence_length, config.seed)
        self.device = torch.device(pick_device(config.device))
        self.model = self._build_model()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
        self.engine: TrainEngine = LocalEngine(self.model, config.optim, dtype)
        self._check_phases()
        self.balance = BalanceState(self.model)
        self.load_NE = {layer: torch.zeros_like(count) for layer, count in self.balance.counts.items()}
        self.step, self.skipped = 0, 0

    def _build_model(self) -> Transformer:
        with torch.device(self.device):
            model = Transformer(self.config.model, self.registry)
        initialize(model, self.config.seed)
        if self.config.model.router.name == "rre":
            counts = {name: self.dataset.token_counts(name) for name in self.dataset.domain_names}
            size = self.config.model.vocab_size
            padded = {name: torch.nn.functional.pad(count, (0, size - len(count))) for name, count in counts.items()}
            fill_route_tables(model, padded, self.config.seed)
        return model

    def train_step(self) -> StepMetrics:
        """Run the next optimizer step."""
        config, step = self.config, self.step
        trains = _accepts(config.phases[config.phase_at(step)].train)
        self.engine.train_only(trains)
        lr = config.optim.lr * rate_ratio(config.schedule, step, config.steps)
        zeros_N = torch.zeros(len(self.registry.domains), dtype=torch.float64)
        metrics = StepMetrics(step=step + 1, lr=lr, loss_sum_N=zeros_N.clone(), labels_N=zeros_N.clone())
        batch = self.loader.batch(range(step * config.global_batch, (step + 1) * config.global_batch))
        labels, tokens = max(batch.num_labels, 1), batch.token_BS.numel()
        for begin in range(0, config.global_batch, config.micro_size):
            micro = batch.rows(begin, begin + config.micro_size)
            output = self._forward(micro, step)
            self.engine.backward(self._objective(output, labels, tokens, metrics))
            self._count(micro, output, metrics)
        result = self.engine.step(lr)
        metrics.grad_norm, metrics.skipped, metrics.tokens = result.grad_norm, result.skipped, tokens
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
