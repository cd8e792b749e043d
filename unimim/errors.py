"""Errors that tell a user what to change."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def refused(sentence: str) -> Iterator[None]:
    """ValueError of that sentence and the network's own words in place of what a network raises
    that does not fit."""
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
