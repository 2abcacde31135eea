"""Whole tensors on their way to disk, from the pieces that all processes hold: one a writer at a time.

Which tensor lies in which file is a function of names and sizes (`plan_files`); each file has an owner, and owners
write in parallel. In round k every owner receives the kth tensor of its files, from all who hold a piece of it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, distributed

from ..moe.storage.durable import DurableDirectory
from ..moe.storage.tensor_format import DTYPE_NAMES
from ..moe.storage.tensors import MAX_FILE_BYTES, NamedTensor, encode_index, plan_files, write_tensor_file
from .agreement import exchange
from .mesh import Axis
from .pieces import Piece

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Gathered(Mapping[str, NamedTensor]):
    """The whole tensors of a state of which every process holds pieces. All processes make it together.

    It tells names, shapes and dtypes; `read` is refused, for no process can read alone: see `write_gathered`.
    """

    def __init__(self, pieces: Iterable[Piece], world: Axis) -> None:
        self.here: dict[str, list[Piece]] = {}
        for piece in pieces:
            if piece.end > piece.begin:
                self.here.setdefault(piece.name, []).append(piece)
        self.places: dict[str, list[_Place]] = {}
        self._tensors: dict[str, NamedTensor] = {}
        rows = [_row(piece) for held in self.here.values() for piece in held]
        for rank, held in enumerate(exchange(rows, world)):
            for name, shape, dtype, *place in held:
                self.places.setdefault(name, []).append(_Place(rank, *place))
                named = NamedTensor(tuple(shape), _DTYPES[dtype], _refuse)
                assert self._tensors.setdefault(name, named) == named, f"{name}: holders differ in shape or dtype"
        for name, places in self.places.items():
            size = self._tensors[name].num_bytes // self._tensors[name].dtype.itemsize
            assert sum(place.end - place.begin for place in places) == size, f"{name}: held more or less than once"

    def __getitem__(self, name: str) -> NamedTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def snapshot(self) -> "Gathered":
        """Return the state as it stands now, this process's pieces copied to host memory; nobody is asked."""
        taken = copy(self)
        taken.here = {
            name: [replace(piece, tensor=host_copy(piece.tensor)) for piece in held] for name, held in self.here.items()
        }
        return taken


def host_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy of its own in host memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def write_gathered(
    directory: DurableDirectory,
    folders: Mapping[str, Gathered],
    world: Axis,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write `folder/folder-*.safetensors` of all `folders`, the files that this process owns; rank 0 the indexes.

    All processes call it. One that fails goes on sending and receiving to the end, then raises.
    """
    plans = {folder: plan_files(folder, tensors, max_file_bytes=max_file_bytes) for folder, tensors in folders.items()}
    files = [(folder, file) for folder, plan in plans.items() for file in plan]
    owned = [files[rank :: world.size] for rank in range(world.size)]
    queues = [[(folders[folder], name) for folder, file in some for name in file.tensors] for some in owned]
    rounds = zip_longest(*queues)

    def read() -> Tensor:
        tensor = _move(next(rounds), world)
        assert tensor is not None
        return tensor

    try:
        for folder, file in owned[world.rank]:
            tensors = {name: folders[folder][name]._replace(read=read) for name in file.tensors}
            write_tensor_file(directory, folder, file, tensors)
        if world.rank == 0:
            for folder, plan in plans.items():
                directory.write(f"{folder}/{folder}.safetensors.index.json", encode_index(plan, folders[folder]))
    except (ValueError, OSError):
        _drain(rounds, world)
        raise
    _drain(rounds, world)


class _Place(NamedTuple):
    """Where a piece of a whole tensor is, and where it belongs; see `Piece`."""

    rank: int
    dim: int | None
    start: int
    stop: int
    begin: int
    end: int

    def flat(self, whole: Tensor) -> Tensor | None:
        """Return the piece's memory in `whole`, where it is one run."""
        box = whole if self.dim is None else whole.narrow(self.dim, self.start, self.stop - self.start)
        return box.view(-1)[self.begin : self.end] if box.is_contiguous() else None

    def put(self, whole: Tensor, data_N: Tensor) -> None:
        """Copy the piece into `whole`."""
        run = self.flat(whole)
        if run is not None:
            run.copy_(data_N)
            return
        assert self.dim == 1, "a box that is no run is a stack of rows"
        box = whole.narrow(1, self.start, self.stop - self.start)
        width, position = box[0].numel(), self.begin
        while position < self.end:
            row, offset = divmod(position, width)
            # To the end of a row, or as many whole rows as there are.
            rows = (self.end - position) // width if offset == 0 else 0
            count = rows * width if rows else min(width - offset, self.end - position)
            data = data_N[position - self.begin : position - self.begin + count]
            if rows:
                box[row : row + rows].copy_(data.view(rows, *box.shape[1:]))
            else:
                box[row].view(-1)[offset : offset + count].copy_(data)
            position += count


def _move(wanted: Sequence[tuple[Gathered, str] | None], world: Axis) -> Tensor | None:
    """Give each rank its wanted tensor whole; return this rank's. All call it with the same."""
    pending: list[distributed.Work | None] = []
    kept: list[Tensor] = []  # until they are sent
    late: list[tuple[_Place, Tensor]] = []
    whole: Tensor | None = None
    for owner, want in enumerate(wanted):
        if want is None:
            continue
        gathered, name = want
        here = [piece.tensor.detach().cpu() for piece in gathered.here.get(name, ())]
        if owner != world.rank:
            kept += here
            pending += [distributed.isend(tensor, dst=owner, group=world.group) for tensor in here]
            continue
        whole = torch.empty(gathered[name].shape, dtype=gathered[name].dtype)
        own = iter(here)
        for place in gathered.places[name]:
            if place.rank == world.rank:
                place.put(whole, next(own))
                continue
            target = place.flat(whole)
            if target is None:
                target = torch.empty(place.end - place.begin, dtype=whole.dtype)
                late.append((place, target))
            pending.append(distributed.irecv(target, src=place.rank, group=world.group))
    for work in pending:
        assert work is not None
        work.wait()
    for place, data in late:
        assert whole is not None
        place.put(whole, data)
    return whole


def _drain(rounds: Iterator[Sequence[tuple[Gathered, str] | None]], world: Axis) -> None:
    for wanted in rounds:
        _move(wanted, world)


def _row(piece: Piece) -> list[object]:
    dtype = DTYPE_NAMES[piece.tensor.dtype]
    return [piece.name, list(piece.shape), dtype, piece.dim, piece.start, piece.stop, piece.begin, piece.end]


def _refuse() -> NoReturn:
    raise AssertionError("this tensor lies on several processes")
