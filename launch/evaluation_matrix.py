"""Models beside each other on the same held-out text: a row a model and way of routing, a column a domain of text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..moe.data.dataset import Dataset
from ..moe.data.indexed import IndexedDocuments
from ..moe.domain_choice import choose_domains
from ..moe.domains import DomainRegistry
from ..moe.model import Transformer
from .evaluation import DomainLoss, HeldoutSettings, Route, text_losses

_DOCUMENTS = 64  # whose domains are chosen between two moves of the progress bar


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model under one way of routing.

    `route` is the name of one of its domains, or `own` (each text under its own domain), or `auto` (each document
    under the domain that its first `auto_tokens` tokens choose), or None where the model needs no domain.
    """

    label: str
    model: int  # position in checkpoint=
    route: str | None
    is_name: bool = False  # a domain may be called own, or auto
    auto_tokens: int | None = None

    @property
    def chooses(self) -> bool:
        """Whether every document chooses its domain."""
        return self.route == "auto" and not self.is_name


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row on one domain's text; `taken` counts the documents that chose each of the model's domains, by name."""

    loss: DomainLoss
    taken: Mapping[str, int] | None = None
    right: float | None = None  # share of the documents that chose the text's own domain, where the model has it


Cells = dict[str, Cell]  # by text


def measure(
    model: Transformer,
    rows: Sequence[Row],
    dataset: Dataset,
    texts: Sequence[str],
    settings: HeldoutSettings,
    on_batch: Callable[[], None] = lambda: None,
    on_documents: Callable[[int], None] = lambda number: None,
) -> list[Cells]:
    """Return the cells of the `rows` of one model, each batch run once for every domain that a row asks for.

    `on_batch` hears of each batch that is done, `on_documents` how many more documents have chosen.
    """
    cells: list[Cells] = [{} for _ in rows]
    for text in texts:
        routes = [_route(model, row, dataset, text, settings, on_documents) for row in rows]
        losses = text_losses(model, dataset, text, routes, settings, on_batch)
        for row_cells, route, loss in zip(cells, routes, losses):
            row_cells[text] = Cell(loss=loss) if isinstance(route, int) else _chosen(loss, route, model.registry, text)
    return cells


def _route(
    model: Transformer,
    row: Row,
    dataset: Dataset,
    text: str,
    settings: HeldoutSettings,
    on_documents: Callable[[int], None],
) -> Route:
    if row.route is None:
        return 0
    if row.chooses:
        assert row.auto_tokens is not None
        number = settings.num_documents(dataset, text)
        return _chosen_domains(model, dataset.domain(text).heldout, number, row.auto_tokens, on_documents)
    return model.registry.id_of(row.route if row.is_name else text)


def _chosen_domains(
    model: Transformer,
    documents: IndexedDocuments,
    number: int,
    auto_tokens: int,
    on_documents: Callable[[int], None],
) -> NDArray[np.int64]:
    """Return the domain that the first tokens of each of the first `number` documents choose, `[N]`."""
    chosen: list[int] = []
    while len(chosen) < number:
        prompts = []
        for index in range(len(chosen), min(len(chosen) + _DOCUMENTS, number)):
            token_T = documents.document(index)
            # A prompt does not end its text; a document of that token alone says nothing, and takes the first domain.
            prompts.append(token_T[: min(auto_tokens, max(len(token_T) - 1, 1))].tolist())
        chosen += choose_domains(model, prompts)
        on_documents(len(prompts))
    return np.array(chosen, np.int64)


def _chosen(loss: DomainLoss, route_N: NDArray[np.int64], registry: DomainRegistry, text: str) -> Cell:
    count = np.bincount(route_N, minlength=len(registry.domains)).tolist()
    taken = dict(zip(registry.names, count))
    return Cell(loss=loss, taken=taken, right=taken[text] / len(route_N) if text in taken else None)
