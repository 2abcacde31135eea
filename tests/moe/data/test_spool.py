import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sigmoe.moe.data.spool import DomainSpool, cut_document

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def spool_of(folder: Path, texts: list[str], fraction: float, domain: str = "a", seed: int = 0) -> DomainSpool:
    spool = DomainSpool(folder=folder, domain=domain, seed=seed, heldout_fraction=fraction)
    for text in texts:
        spool.add(text)
    spool.close()
    return spool


def read(spool: DomainSpool) -> dict[str, list[str]]:
    return {split: list(spool.texts(split)) if count.documents else [] for split, count in spool.counts.items()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, max_size=40), fraction=st.floats(0.05, 0.95))
def test_each_different_text_is_in_exactly_one_split(texts: list[str], fraction: float, tmp_path: Path) -> None:
    spool = spool_of(tmp_path, texts, fraction)
    splits = read(spool)
    visible = [text for text in texts if text.strip()]
    assert sorted(splits["train"] + splits["heldout"]) == sorted(set(visible))
    assert spool.duplicates == len(visible) - len(set(visible))
    assert spool.blank == len(texts) - len(visible)
    for split, count in spool.counts.items():
        assert count.documents == len(splits[split])
        assert count.bytes == sum(len(text.encode()) for text in splits[split])


def test_the_split_depends_on_text_and_seed_alone(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(2000)]
    one = set(read(spool_of(tmp_path, texts, 0.1, "a"))["heldout"])
    other = set(read(spool_of(tmp_path, list(reversed(texts[::2])), 0.1, "b"))["heldout"])
    assert other == one & set(texts[::2])
    assert 140 < len(one) < 260
    assert one != set(read(spool_of(tmp_path, texts, 0.1, "c", seed=1))["heldout"])
    larger = set(read(spool_of(tmp_path, texts, 0.2, "d"))["heldout"])
    assert one < larger


def test_smallest_is_the_fraction_that_would_hold_one_out(tmp_path: Path) -> None:
    texts = ["a", "b", "c"]
    nothing = spool_of(tmp_path, texts, 1e-9, "a")
    assert nothing.counts["heldout"].documents == 0
    enough = spool_of(tmp_path, texts, nothing.smallest + 1e-6, "b")
    assert enough.counts["heldout"].documents == 1


def test_reading_stops_at_a_size(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, ["aaaa", "bbbb", "cccc"], 1e-9)
    everything = list(spool.texts("train"))
    assert sorted(everything) == ["aaaa", "bbbb", "cccc"]
    assert list(spool.texts("train", 5)) == everything[:2]
    assert list(spool.texts("train", 4)) == ["aaaa"]


def test_order_is_keyed_by_the_text_and_not_by_arrival(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(20)]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    forward = list(spool_of(tmp_path / "one", texts, 1e-9).texts("train"))
    backward = list(spool_of(tmp_path / "two", texts[::-1], 1e-9).texts("train"))
    assert forward == backward
    assert forward != texts


@given(text=st.text(max_size=300), limit=st.integers(4, 40))
def test_cut_documents_are_whole_again_and_never_split_a_character(text: str, limit: int) -> None:
    data = text.encode()
    pieces = list(cut_document(data, limit))
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= limit for piece in pieces) or not data
    assert "".join(piece.decode() for piece in pieces) == text


def test_documents_are_cut_at_line_ends() -> None:
    assert list(cut_document(b"one\ntwo\nthree\nfour", 9)) == [b"one\ntwo\n", b"three\n", b"four"]
    assert list(cut_document(b"one\ntwo", None)) == [b"one\ntwo"]


def test_pieces_of_a_document_stay_in_one_split(tmp_path: Path) -> None:
    spool = DomainSpool(folder=tmp_path, domain="d", seed=0, heldout_fraction=0.5, document_bytes=256)
    for number in range(40):
        spool.add("".join(f"{number} {line}\n" for line in range(100)))
    spool.close()
    owners = {split: {text.split()[0] for text in spool.texts(split)} for split in ("train", "heldout")}
    assert owners["train"] & owners["heldout"] == set()
    assert sum(count.documents for count in spool.counts.values()) > 80


def test_another_process_reads_the_same(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, [f"text {number}" for number in range(60)] + ["text 7", " "], 0.3)
    again = DomainSpool.from_json(json.loads(json.dumps(spool.to_json())))
    assert read(again) == read(spool) and len(read(spool)["train"]) > 20
    assert (again.counts, again.bytes, again.smallest) == (spool.counts, spool.bytes, spool.smallest)
    assert (again.duplicates, again.blank) == (1, 1)
