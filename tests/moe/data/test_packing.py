from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sigmoe.moe.batch import IGNORED
from sigmoe.moe.data.packing import DomainStream, Rows, epoch_order

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)
COMMON = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Documents whose ids are all different, but for the end-of-text id 0."""
    ids = iter(range(1, 1000))
    return [[next(ids) for _ in range(length - 1)] + [0] for length in lengths]


def rows_of(size: int) -> Rows:
    return Rows(*(np.full(size, -7, np.int64) for _ in Rows._fields))


def brute_force(read, seed: int, size: int, number: int) -> list[tuple[list[int], list[int], list[int]]]:
    """The first sequences, from a stream of (id, label, instance of the document) written out token by token."""
    stream: list[tuple[int, int, int]] = []
    epoch = instance = 0
    while len(stream) < size * number:
        for index in epoch_order(read, seed, "law", epoch).document_N:
            ids = read.document(int(index)).tolist()
            stream += [(id, label, instance) for id, label in zip(ids, [*ids[1:], IGNORED])]
            instance += 1
        epoch += 1
    sequences = []
    for row in range(number):
        part = stream[row * size : (row + 1) * size]
        instances = [item[2] for item in part]
        sequences.append(
            ([item[0] for item in part], [item[1] for item in part], [instances.index(i) for i in instances])
        )
    return sequences


@COMMON
@given(lengths=LENGTHS, size=st.integers(2, 40), seed=st.integers(0, 3))
def test_sequences_are_those_of_the_written_out_stream(
    lengths: list[int], size: int, seed: int, tmp_path: Path, write_documents
) -> None:
    read = write_documents(tmp_path / "a.bin", documents_of(lengths))
    stream = DomainStream(read, seed, "law")
    number = 3 * sum(lengths) // size + 2
    expected = brute_force(read, seed, size, number)
    for ordinal in [*range(number), *reversed(range(number))]:  # in any order: nothing depends on what came before
        rows = rows_of(size)
        stream.fill(ordinal, rows)
        assert tuple(array.tolist() for array in rows) == expected[ordinal]


@COMMON
@given(lengths=LENGTHS, size=st.integers(2, 20))
def test_every_token_of_every_document_comes_once_an_epoch(
    lengths: list[int], size: int, tmp_path: Path, write_documents
) -> None:
    documents = documents_of(lengths)
    read = write_documents(tmp_path / "a.bin", documents)
    stream, total = DomainStream(read, 1, "law"), sum(lengths)
    epochs = size  # after that many epochs a sequence ends where an epoch ends
    seen = []
    for ordinal in range(epochs * total // size):
        rows = rows_of(size)
        stream.fill(ordinal, rows)
        seen += rows.token_S.tolist()
    for epoch in range(epochs):
        part = seen[epoch * total : (epoch + 1) * total]
        assert sorted(part) == sorted(id for document in documents for id in document)


@COMMON
@given(lengths=LENGTHS, size=st.integers(2, 40), ordinal=st.integers(0, 50))
def test_labels_never_cross_a_document(
    lengths: list[int], size: int, ordinal: int, tmp_path: Path, write_documents
) -> None:
    documents = documents_of(lengths)
    read = write_documents(tmp_path / "a.bin", documents)
    follower = {a: b for document in documents for a, b in pairwise(document)}
    rows = rows_of(size)
    DomainStream(read, 1, "law").fill(ordinal, rows)
    for position, (token, label, start) in enumerate(zip(*(array.tolist() for array in rows))):
        assert label == (IGNORED if token == 0 else follower[token])
        first = position
        while first > 0 and rows.token_S[first - 1] != 0:
            first -= 1
        assert start == first


@COMMON
@given(number=st.integers(1, 200), seed=st.integers(0, 2**32), epoch=st.integers(0, 2**31))
def test_epochs_are_keyed_permutations(number: int, seed: int, epoch: int, tmp_path: Path, write_documents) -> None:
    read = write_documents(tmp_path / "a.bin", [[0]] * number)
    order = epoch_order(read, seed, "law", epoch)
    assert sorted(order.document_N.tolist()) == list(range(number))
    assert np.array_equal(order.document_N, epoch_order(read, seed, "law", epoch).document_N)
    assert order.end_N.tolist() == list(range(1, number + 1))


def test_order_depends_on_seed_domain_and_epoch(tmp_path: Path, write_documents) -> None:
    read = write_documents(tmp_path / "a.bin", [[0]] * 100)
    keys = [(0, "law", 0), (1, "law", 0), (0, "code", 0), (0, "law", 1)]
    orders = {tuple(epoch_order(read, *key).document_N.tolist()) for key in keys}
    assert len(orders) == 4


def test_order_is_the_same_for_ever(tmp_path: Path, write_documents) -> None:
    """A change here would change the data of every resumed run."""
    read = write_documents(tmp_path / "a.bin", [[0]] * 8)
    assert epoch_order(read, 0, "law", 0).document_N.tolist() == [2, 5, 4, 6, 1, 0, 3, 7]
