"""Text while tokens come: never half a character, and together what the decoder makes of all of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from sigmoe.moe.data.tokenizer import train_tokenizer
from sigmoe.moe.generation.text import TextStream


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["der die das und 的 了 是"] * 9, 300)


def pieces_of(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [stream.push(id) for id in ids], stream.finish()


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_are_whole_characters_and_together_the_text(tokenizer, text):
    ids = tokenizer.encode(text).ids
    pieces, rest = pieces_of(tokenizer, ids)
    assert "".join(pieces) + rest == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)
        assert rest == ""


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(2, 257), max_size=12))
def test_any_bytes_give_what_the_decoder_gives(tokenizer, ids):
    pieces, rest = pieces_of(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


def test_a_character_comes_with_its_last_byte(tokenizer):
    ids = tokenizer.encode("a😀b").ids
    pieces, rest = pieces_of(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["a", "😀", "b"]
    assert len(ids) > 3 and rest == ""


def test_half_a_character_at_the_end_is_told_at_the_end(tokenizer):
    pieces, rest = pieces_of(tokenizer, tokenizer.encode("a😀").ids[:-1])
    assert ("".join(pieces), rest) == ("a", "\ufffd")


def test_special_tokens_are_no_text(tokenizer):
    a = tokenizer.encode("ab").ids
    assert "".join(pieces_of(tokenizer, [0, *a, 0, *a, 1])[0]) == "abab"


def test_a_decoder_that_treats_the_first_token_differently():
    """Spaces as in tokenizers that mark a word's beginning: the first word's is dropped."""
    tokenizer = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "s": 2}, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    assert pieces_of(tokenizer, [0, 1, 2, 1])[0] == ["one", " two", "s", " two"]
