"""One pass of calibration text through a model larger than memory: all criteria's sums, layer by layer, resumable.

Step 0 is the embedding, step n the layer n - 1. All batches pass a step before the next one begins; in between their
hidden states lie in a work folder. In memory are one batch, and of the weights a layer's shared part or one expert.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..config import ModelConfig, layer_experts
from ..identity import model_identity
from ..storage.durable import require_space
from ..stored import StoredModel
from ..streaming import Running, StreamedModel
from ..workers import ALONE, Workers
from .collect import Collector
from .criteria import check_enumerable
from .prunable import check_prunable
from .spill import Spill
from .sums import CalibrationSums, LayerSums
from .text import CalibrationText

_SPILL_VERSION = 1


def calibrate(
    model: StoredModel,
    text: CalibrationText,
    work: Path,
    *,
    subsets: bool = False,
    workers: Workers = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationSums:
    """Return the sums of every sparse layer over all tokens of `text`.

    A batch's sums are computed by one worker and added in the order of the batches, so the result has the same bits
    however many workers there are, and whether or not a killed run is continued. (Each must have as many threads: the
    bits of a matrix product may depend on that.)

    Args:
        model: with one learned gate over all experts of a layer.
        text: what to run.
        work: the work folder; a later call with equal arguments goes on there. Remove it when the sums are saved.
        subsets: also collect `LayerSums.subset_error`, for which all tokens pass all experts: E / K times the work.
        workers: who shares it, and the work folder.
        progress: hears batches passed through a step, of all batches times all steps.

    Raises:
        ValueError: a model that cannot be pruned, or with `subsets` one with too many experts a layer; text of a
            domain that the model does not know.
        WriteError: the disk refuses.
    """
    check_prunable(model.config, model.registry)
    experts = layer_experts(model.config, model.registry)
    if subsets:
        check_enumerable(experts)
    run = _Calibration(model, text, work, subsets, workers)
    identity = workers.from_first(lambda: model_identity(model))
    # Without the last sparse layer's output: nothing needs it.
    steps = max(model.config.sparse_layer_ids) + 2
    for step in range(run.begin(identity), steps):
        run.take(step, keep_hidden=step < steps - 1, progress=lambda done: progress(done, steps * len(text)))
    with workers.together():
        layers = tuple(
            LayerSums.unpack(run.spill.sums(layer + 1), number)
            for layer, number in zip(model.config.sparse_layer_ids, experts, strict=True)
        )
    return CalibrationSums(model=identity, text=text.description, layers=layers)


class _Calibration:
    """What the steps of one call share."""

    def __init__(self, model: StoredModel, text: CalibrationText, work: Path, subsets: bool, workers: Workers) -> None:
        self.spill, self._work = Spill(work), work
        self._config: ModelConfig = model.config
        self._model, self._text, self._subsets, self._workers = StreamedModel(model), text, subsets, workers

    def begin(self, identity: str) -> int:
        """Return the first step to take; the lead prepares the folder."""
        settings = {
            "format_version": _SPILL_VERSION,
            "model": identity,
            "text": dict(self._text.description),
            "batch_size": self._text.batch_size,
            "subsets": self._subsets,
        }

        def prepare() -> int:
            steps = self.spill.prepare(settings)
            if steps == 0:  # before and after a step the hidden states lie side by side
                require_space(self._work, 2 * 4 * self._text.description["tokens"] * self._config.dim)
            return steps

        return self._workers.from_first(prepare)

    def take(self, step: int, *, keep_hidden: bool, progress: Callable[[int], None]) -> None:
        """Take all batches through `step`, this worker every `size`-th of them."""
        rank, size, number = self._workers.rank, self._workers.size, len(self._text)
        total: Tensor | None = None
        for first in range(0, number, size):
            with self._workers.together():
                mine = [self._run(step, first + rank, keep_hidden)] if first + rank < number else []
            for sums in self._workers.gather(mine):
                total = sums if total is None else total + sums
            progress(step * number + min(first + size, number))
        assert total is not None
        done = total
        self._workers.from_first(lambda: self.spill.finish(step, done))  # until then the step's file may be missing

    def _run(self, step: int, index: int, keep_hidden: bool) -> Tensor:
        """Take one batch through `step`; returns its sums as a vector, empty where the step collects none."""
        batch, sums = self._text.batch(index), torch.empty(0, dtype=torch.float64)
        if step == 0:
            (running,) = self._model.embed([batch])
        else:
            running = self._model.resume(batch, self.spill.read_hidden(step - 1, index))
            sums = self._through(step - 1, running, sums)
        if keep_hidden:
            self.spill.write_hidden(step, index, running.x_BSD)
        return sums

    def _through(self, layer: int, running: Running, nothing: Tensor) -> Tensor:
        if layer not in self._config.sparse_layer_ids:
            self._model.run_layer(layer, [running])
            return nothing
        running.watcher = collector = Collector(self._config.router, subsets=self._subsets)
        self._model.run_layer(layer, [running])
        return collector.sums.pack()
