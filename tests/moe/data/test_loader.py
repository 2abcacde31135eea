import numpy as np
import pytest
import torch

from sigmoe.moe.batch import IGNORED
from sigmoe.moe.data.baseline import heldout_label_counts, unigram_bits_per_byte
from sigmoe.moe.data.dataset import Dataset
from sigmoe.moe.data.loader import BatchLoader, heldout_batches
from sigmoe.moe.data.sampling import Phase, Sampler

SIZE = 16


@pytest.fixture(scope="module")
def loader(dataset: Dataset) -> BatchLoader:
    phases = [
        Phase(end=50, weights={"fruit": 1, "law": 2, "code": 1}),
        Phase(start=50, weights={"law": 1}),
    ]
    return BatchLoader(dataset, Sampler(phases, dataset.domain_names), SIZE, seed=3)


def test_batches_do_not_depend_on_how_the_indices_are_cut(loader: BatchLoader) -> None:
    whole = loader.batch(range(0, 64))
    fresh = BatchLoader(loader.dataset, loader.sampler, SIZE, seed=3)
    for begin, end in [(48, 64), (0, 7), (7, 48), (13, 14)]:
        part, expected = fresh.batch(range(begin, end)), whole.rows(begin, end)
        for name in ("token_BS", "label_BS", "start_BS", "domain_B", "sample_B"):
            assert torch.equal(getattr(part, name), getattr(expected, name))
    assert whole.sample_B.tolist() == list(range(64))
    assert all(getattr(whole, name).dtype == torch.int64 for name in ("token_BS", "label_BS", "start_BS", "domain_B"))


def test_samples_come_from_their_domain(loader: BatchLoader) -> None:
    batch = loader.batch(range(64))
    assert torch.bincount(batch.domain_B[:50], minlength=3).tolist() == [13, 25, 12]
    assert set(batch.domain_B[50:].tolist()) == {1}
    for row, domain in enumerate(batch.domain_B.tolist()):
        name = loader.dataset.domain_names[domain]
        allowed = loader.dataset.token_counts(name) > 0
        assert bool(allowed[batch.token_BS[row]].all())


def test_another_seed_gives_other_samples(loader: BatchLoader) -> None:
    other = BatchLoader(loader.dataset, loader.sampler, SIZE, seed=4)
    assert not torch.equal(other.batch(range(8)).token_BS, loader.batch(range(8)).token_BS)


def test_consumption_is_counted(loader: BatchLoader) -> None:
    seen = loader.tokens_seen(60)
    assert sum(seen.values()) == 60 * SIZE
    batch = loader.batch(range(60))
    for id, (name, tokens) in enumerate(seen.items()):
        assert tokens == int((batch.domain_B == id).sum()) * SIZE
        assert loader.epochs(60)[name] == tokens / loader.dataset.domain(name).train.num_tokens


@pytest.mark.parametrize("max_tokens", [None, 1, 37, SIZE, 100, 10**9])
def test_heldout_labels_are_each_token_once(loader: BatchLoader, max_tokens: int | None) -> None:
    for name in loader.dataset.domain_names:
        batches = list(heldout_batches(loader.dataset, name, batch_size=3, sequence_length=SIZE, max_tokens=max_tokens))
        label = torch.cat([batch.label_BS.flatten() for batch in batches])
        count_V = torch.bincount(label[label != IGNORED], minlength=loader.dataset.vocab_size)
        assert np.array_equal(count_V.numpy(), heldout_label_counts(loader.dataset, name, max_tokens))
        assert all(batch.token_BS.shape == (3, SIZE) for batch in batches)
        assert torch.cat([batch.sample_B for batch in batches]).tolist() == list(range(3 * len(batches)))
        documents = loader.dataset.domain(name).heldout
        if max_tokens is None:
            assert int(count_V.sum()) == documents.num_tokens - documents.num_documents
        tokens = torch.cat([batch.token_BS.flatten() for batch in batches])
        read = documents.num_tokens if max_tokens is None else min(max_tokens, documents.num_tokens)
        assert np.array_equal(tokens[:read].numpy(), documents.tokens[:read])
        assert set(tokens[read:].tolist()) <= {loader.dataset.padding}
        assert set(label[read:].tolist()) <= {IGNORED}


def test_padding_starts_its_own_document(loader: BatchLoader) -> None:
    *_, last = heldout_batches(loader.dataset, "fruit", batch_size=4, sequence_length=SIZE, max_tokens=5)
    assert last.start_BS[0, 5:].tolist() == [5] * (SIZE - 5)
    assert last.start_BS[1:].tolist() == [[0] * SIZE] * 3


def test_unigram_baseline_against_a_plain_sum(loader: BatchLoader) -> None:
    dataset = loader.dataset
    for name in dataset.domain_names:
        count = dataset.token_counts(name).double()
        probability = (count + 1) / (count.sum() + dataset.vocab_size)
        sizes = dataset.token_bytes()
        bits = bytes_ = 0.0
        for index in range(dataset.domain(name).heldout.num_documents):
            for token in dataset.domain(name).heldout.document(index)[1:].tolist():
                bits -= float(torch.log2(probability[token]))
                bytes_ += int(sizes[token])
        assert unigram_bits_per_byte(dataset, name) == pytest.approx(bits / bytes_, rel=1e-9)


def test_wrong_use_is_refused(dataset: Dataset) -> None:
    sampler = Sampler([Phase(weights={"a": 1})], ("a",))
    with pytest.raises(ValueError, match="domains"):
        BatchLoader(dataset, sampler, SIZE, seed=0)
    sampler = Sampler([Phase(weights={"law": 1})], dataset.domain_names)
    with pytest.raises(ValueError, match="sequence_length"):
        BatchLoader(dataset, sampler, 1, seed=0)
    with pytest.raises(ValueError, match="unknown domain 'x'; known domains: fruit, law, code"):
        next(heldout_batches(dataset, "x", batch_size=1, sequence_length=SIZE))
