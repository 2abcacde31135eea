"""What torch says when another process is gone, as a line for the user."""

import re

from torch import distributed

_MOST = 160  # characters


def lost_peer(error: RuntimeError) -> str | None:
    """Return a line where an operation failed because another process is gone, or did not answer in time."""
    if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
        return None
    why = plain_words(error)
    return f"another process is gone or does not answer ({why}): run again to go on from the newest checkpoint"


def plain_words(error: BaseException) -> str:
    """Return the beginning of what another library says: one sentence on one line, without the place in its source."""
    words = re.sub(r"^\[[^]]*\] |\[/[^]]*\] ", "", " ".join(str(error).split()))
    return words.partition(". ")[0][:_MOST]
