"""Turn a network's errors into messages that tell a user what to change."""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class OptionError(ValueError):
    """An option of a constructor has a value that cannot be used.

    option, value: "option=value" begins the message; with the value None "option:" does.
    problem: the rest of it: what is wrong and what to use.
    others: further options that `problem` names.
    """

    def __init__(self, option: str, value: Any, problem: str, *others: str):
        super().__init__(option, value, problem, *others)

    def __str__(self) -> str:
        option, value, problem, *_ = self.args
        return f"{option}: {problem}" if value is None else f"{option}={value} {problem}"

    def in_flags(self, flags: Mapping[str, str]) -> str:
        """Return the message with `flags[option]` in place of each option, as a command has it."""
        option, value, problem, *others = self.args
        for other in others:
            problem = re.sub(rf"\b{other}\b", _spelled(other, flags), problem)
        spelled = _spelled(option, flags)
        if value is None:
            return f"{spelled}: {problem}"
        return f"{spelled}{' ' if option in flags else '='}{value} {problem}"


def check_choice(option: str, value: str, choices: Collection[str]) -> None:
    """Raise an OptionError if the value of a constructor option is none of the choices."""
    if value not in choices:
        raise OptionError(option, value, f"is unknown; take one of {', '.join(choices)}")


def _spelled(option: str, flags: Mapping[str, str]) -> str:
    return f"--{flags[option]}" if option in flags else f"--model_kwargs {option}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean A or B?" with the names that are spelled like `name`, else ";"."""
    similar = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.75)
    return f"; did you mean {' or '.join(similar)}?" if similar else ";"


@contextmanager
def refused(what: str | OptionError) -> Iterator[None]:
    """Raise errors from inside as `what` (a ValueError's sentence or an OptionError), then the
    original message."""
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
        reason = " ".join(str(error).split())
        if isinstance(what, OptionError):
            option, value, problem, *others = what.args
            raise OptionError(option, value, f"{problem}: {reason}", *others) from error
        raise ValueError(f"{what}: {reason}") from error
