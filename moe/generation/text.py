"""Tokens to text while they come: what is given out is never taken back, and never ends in half a character."""

from tokenizers import Tokenizer

_UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no character yet


class TextStream:
    """Decodes a growing list of tokens, a piece at a time; the pieces together are the text of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A decoder may treat the first token differently, so it always gets some that were given out already.
        self._ids: list[int] = []
        self._given = 0  # of `_ids`

    def push(self, token: int) -> str:
        """Return the text that the next token completes; empty while a character lacks bytes."""
        self._ids.append(token)
        piece = self._piece()
        if not piece or piece.endswith(_UNFINISHED):
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return piece

    def finish(self) -> str:
        """Return what is left at the end, unfinished characters as U+FFFD."""
        piece = self._piece()
        self._ids, self._given = [], 0
        return piece

    def _piece(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._given])) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
