"""The key `file_bytes`: the most that a weight file holds. Files are what processes share out among them."""

from ..moe.parsing import parse_bytes

DEFAULT_FILE_BYTES = "4GiB"
_LEAST = 1 << 20


def parse_file_bytes(given: int | str) -> int:
    """Return the number; ValueError where it is none, or so small that a model would fall into countless files."""
    number = parse_bytes(given, "file_bytes") if isinstance(given, str) else given
    if number < _LEAST:
        raise ValueError(f"file_bytes must be at least {_LEAST}, got {given}")
    return number
