"""Turn a network's errors into messages that tell a user what to change."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def refused(sentence: str) -> Iterator[None]:
    """Raise errors from inside as ValueError: `sentence`, then the original message."""
    try:
        yield
    except (
        AssertionError,
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"{sentence}: {' '.join(str(error).split())}") from error
