"""What several processes write together: one directory, which each fills in part, and a model's tensor files in it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

from ..workers import Workers
from .copying import copy_tensor_file
from .durable import DurableDirectory
from .tensors import MAX_FILE_BYTES, NamedTensor, encode_index, plan_files

Directory = TypeVar("Directory", bound=DurableDirectory)


@contextmanager
def shared_directory(
    workers: Workers, made: AbstractContextManager[Directory], other: Callable[[Path], Directory]
) -> Iterator[Directory]:
    """Yield the directory under construction to every process, to all but the first what `other` makes of its path.

    Rank 0 enters `made`, which gives the directory its name at the end.
    """

    def tell(directory: Directory) -> list[object]:
        return [str(directory.root), directory.notes()]

    with workers.first_holds(made, tell) as (own, (root, there)):
        if own is not None:
            yield own
            return
        directory = other(Path(root))
        directory.adopt(there)
        directory.finished = frozenset(there)
        yield directory


class TensorFiles:
    """A model's tensors, planned into `FOLDER/model-0000i-of-0000N.safetensors` with their index; FOLDER may be ".".

    `hash_tensors` takes the hash of every tensor, beside those of the files, which costs as much time again.
    """

    def __init__(
        self,
        folder: str,
        tensors: Mapping[str, NamedTensor],
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
        hash_tensors: bool = True,
    ) -> None:
        self._folder, self._tensors, self._hash_tensors = folder, tensors, hash_tensors
        self._files = plan_files("model", tensors, max_file_bytes=max_file_bytes)
        self.num_bytes = sum(tensor.num_bytes for tensor in tensors.values())

    def write(
        self,
        directory: DurableDirectory,
        workers: Workers,
        write_documents: Callable[[], None],
        progress: Callable[[int, int], None],
    ) -> dict[str, str]:
        """Write the files, each process its share, rank 0 the index and `write_documents` too; return tensors' hashes.

        Then `directory` knows all files on all. `progress` hears bytes written and in all, of this share.
        """
        with workers.together():
            if workers.rank == 0:
                write_documents()  # first, since they may be refused
                directory.write(self._place("model.safetensors.index.json"), encode_index(self._files, self._tensors))
            self._write_share(directory, workers, progress)
        for written in workers.exchange(directory.notes()):
            directory.adopt(written)
        return {name: hash for file in self._files for name, hash in directory.parts[self._place(file.name)].items()}

    def _write_share(self, directory: DurableDirectory, workers: Workers, progress: Callable[[int, int], None]) -> None:
        share = self._files[workers.rank :: workers.size]
        sizes = {file: sum(self._tensors[name].num_bytes for name in file.tensors) for file in share}
        total, done = sum(sizes.values()), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        for file in share:
            if self._place(file.name) in directory.finished:
                advance(sizes[file])
            else:
                copy_tensor_file(
                    directory, self._folder, file, self._tensors, hash_tensors=self._hash_tensors, advance=advance
                )

    def _place(self, name: str) -> str:
        return name if self._folder == "." else f"{self._folder}/{name}"
