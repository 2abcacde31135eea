"""The engine of one process: AdamW over canonical views, fp32 masters.

Every expert is an optimizer entry of its own (a view of the stacked weights), so that state, norm and freezing go by
canonical name, whatever the tensors look like in memory.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..moe.canonical import canonical_tensors, canonical_views
from ..moe.precision import is_narrow, wide_dtype
from ..moe.storage.tensors import named_tensors
from .adamw import MOMENTS, build_adamw
from .engine import NamedState, OptimizerConfig, StepResult, TensorSource


class LocalEngine:
    """Owns all parameters of `model`, given in fp32 or fp64. With a narrower `dtype` they are rounded to it, but for
    the routers' gates, and fp32 masters are kept."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.config = model, config
        self.parameters = dict(model.named_parameters())
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            self.masters.update(canonical_views(name, parameter.detach()))
            if is_narrow(dtype) and not name.endswith("gate.weight"):
                parameter.data = parameter.data.to(dtype)
        self.gradients: dict[str, Tensor] = {}  # fp32 sums, used where the parameters are narrower
        self.loss_finite = True
        self.trains: Callable[[str], bool] = lambda name: True
        decayed = [master for master in self.masters.values() if master.dim() > 1]
        rest = [master for master in self.masters.values() if master.dim() <= 1]
        self.optimizer = build_adamw(decayed, rest, config)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; narrower gradients are summed in fp32."""
        self.loss_finite = self.loss_finite and bool(loss.detach().isfinite())
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in self.parameters.items():
            if is_narrow(parameter.dtype) and parameter.grad is not None:
                total = self.gradients.get(name)
                narrow = parameter.grad.float()
                self.gradients[name] = narrow if total is None else total.add_(narrow)
                parameter.grad = None

    def step(self, lr: float) -> StepResult:
        """Clip by the global norm and update; skip where loss or norm is not finite."""
        gradients = self._canonical_gradients()
        norms = torch._foreach_norm(list(gradients.values()))
        norm = float(torch.stack(norms).double().norm()) if norms else 0.0
        skipped = not self.loss_finite or norm != norm or norm == float("inf")
        if not skipped:
            if self.config.clip_norm is not None and norm > self.config.clip_norm:
                torch._foreach_mul_(list(gradients.values()), self.config.clip_norm / norm)
            self._update(gradients, lr)
        self.model.zero_grad(set_to_none=True)
        self.gradients.clear()
        self.loss_finite = True
        return StepResult(grad_norm=norm, skipped=skipped)

    def train_only(self, trains: Callable[[str], bool]) -> None:
        """Freeze every parameter that `trains` refuses: neither gradient nor decay moves it, its moments stand."""
        if not any(trains(name) for name in self.masters):
            raise ValueError("no parameter would train: widen the phase's train patterns")
        self.trains = trains

    def named_state(self) -> NamedState:
        """Return masters and buffers, and moments and step of each parameter, read lazily."""
        tensors = canonical_tensors(self.model) | self.masters
        return NamedState(model=named_tensors(tensors), optimizer=named_tensors(self._moments()))

    def load_named_state(self, model: TensorSource, optimizer: TensorSource | None) -> None:
        """Copy a state in; without `optimizer` the moments and steps start from zero."""
        tensors = canonical_tensors(self.model) | self.masters
        moments = self._moments()
        check_source(tensors, model)
        if optimizer is not None:
            check_source(moments, optimizer)
            for name, tensor in moments.items():
                tensor.copy_(optimizer.read(name))
        else:
            for tensor in moments.values():
                tensor.zero_()
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(model.read(name))
        self._publish()

    def _moments(self) -> dict[str, Tensor]:
        return {f"{n}.{m}": self.optimizer.state[p][m] for n, p in self.masters.items() for m in MOMENTS}

    def _canonical_gradients(self) -> dict[str, Tensor]:
        """Return gradients of what trains, in fp32 at least, zeros where backward reached a parameter not at all."""
        gradients: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            gradient = self.gradients.get(name, parameter.grad)
            if gradient is None:
                gradient = torch.zeros_like(parameter, dtype=wide_dtype(parameter.dtype))
            gradients.update(canonical_views(name, gradient))
        return {name: gradient for name, gradient in gradients.items() if self.trains(name)}

    def _update(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        for name, master in self.masters.items():
            master.grad = gradients.get(name)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the masters into narrower parameters."""
        for name, parameter in self.parameters.items():
            if is_narrow(parameter.dtype):
                for canonical, view in canonical_views(name, parameter):
                    view.copy_(self.masters[canonical])


def check_source(wanted: Mapping[str, Tensor], source: TensorSource) -> None:
    """Raise ValueError that names the first tensor which is missing, left over or of another shape."""
    names = set(source.names())
    for name, tensor in wanted.items():
        if name not in names:
            raise ValueError(f"the checkpoint lacks {name}: it belongs to a model of another shape")
        if source.shape(name) != tuple(tensor.shape):
            raise ValueError(
                f"{name} is {list(source.shape(name))} in the checkpoint and {list(tensor.shape)} in the model: "
                "change the model config back"
            )
    left_over = sorted(names - set(wanted))
    if left_over:
        raise ValueError(f"the checkpoint holds {left_over[0]}, the model does not: change the model config back")
