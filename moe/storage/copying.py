"""Tensor files made of other files' tensors, as fast as the disk takes them.

Threads share the work, a piece at a time: one reads ahead, one hashes the tensor, one the file, and one writes.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from .durable import DurableDirectory
from .tensor_format import encode_header
from .tensors import NamedTensor, TensorFile, tensor_pieces


def copy_tensor_file(
    directory: DurableDirectory,
    folder: str,
    file: TensorFile,
    tensors: Mapping[str, NamedTensor],
    *,
    hash_tensors: bool = True,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one planned file; with `hash_tensors` the SHA-256 of each tensor's bytes go into `directory.parts`.

    The tensors are read on another thread, each while the one before is written. `advance` hears bytes written.
    """
    hashes = {name: hashlib.sha256() for name in file.tensors if hash_tensors}
    with (
        directory.open(PurePosixPath(folder, file.name).as_posix()) as writer,
        ThreadPoolExecutor(2, thread_name_prefix="copy") as pool,
    ):
        writer.write(encode_header({name: (tensors[name].shape, tensors[name].dtype) for name in file.tensors}))
        pieces = ((name, piece) for name in file.tensors for piece in tensor_pieces(name, tensors[name]))
        for name, piece in _ahead(pieces, pool):
            hashing = pool.submit(hashes[name].update, piece) if hash_tensors else None
            writer.write(piece)
            if hashing is not None:
                hashing.result()
            advance(piece.nbytes)
        writer.parts = {name: digest.hexdigest() for name, digest in hashes.items()}


def _ahead(items: Iterator[tuple[str, memoryview]], pool: ThreadPoolExecutor) -> Iterator[tuple[str, memoryview]]:
    """Yield what `items` yields; the next one is fetched meanwhile, never the one after it."""
    pending = pool.submit(next, items, None)
    while (item := pending.result()) is not None:
        pending = pool.submit(next, items, None)
        yield item
