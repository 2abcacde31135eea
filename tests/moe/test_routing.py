import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmoe.moe.batch import IGNORED, Batch
from sigmoe.moe.routing import group_by_domain, merge_groups


def test_no_domains_no_groups():
    assert group_by_domain(None) == ()


def test_one_domain_takes_the_whole_batch_without_a_copy():
    (group,) = group_by_domain(torch.tensor([3, 3]))
    x = torch.rand(2, 4)
    assert (group.domain, group.rows) == (3, None)
    assert group.of(x) is x


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_groups_cover_the_batch_and_merge_restores_its_order(domains):
    domain_B = torch.tensor(domains)
    groups = group_by_domain(domain_B)
    assert [group.domain for group in groups] == sorted(set(domains))
    for group in groups:
        assert set(group.of(domain_B).tolist()) == {group.domain}
    x = torch.arange(3 * len(domains)).view(len(domains), 3)
    assert torch.equal(merge_groups(groups, [group.of(x) for group in groups]), x)


def test_batch_rows_and_labels():
    batch = Batch(
        token_BS=torch.arange(6).view(3, 2),
        label_BS=torch.tensor([[1, IGNORED], [3, 4], [IGNORED, IGNORED]]),
        start_BS=torch.zeros(3, 2, dtype=torch.int64),
        domain_B=torch.tensor([0, 1, 0]),
        sample_B=torch.tensor([5, 6, 7]),
    )
    assert batch.num_labels == 3
    part = batch.rows(1, 3)
    assert part.token_BS.tolist() == [[2, 3], [4, 5]]
    assert (part.domain_B.tolist(), part.sample_B.tolist(), part.num_labels) == ([1, 0], [6, 7], 2)
    assert part.token_BS.data_ptr() == batch.token_BS[1:].data_ptr()
    assert torch.equal(batch.to(torch.device("cpu")).label_BS, batch.label_BS)
