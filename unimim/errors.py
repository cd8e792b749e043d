"""Turn a network's errors into messages that tell a user what to change."""

import difflib
import errno
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


SHARED_MEMORY = "docs/engine.md#workers-and-shared-memory"
# What errors of the surroundings are told by, in torch's and the system's words.
_SURROUNDINGS = (
    (
        r"Too many open files|received \d+ items of ancdata",
        "too many open files: raise the limit by 'ulimit -n 65536' before the start, or lower "
        "--num_workers",
    ),
    (
        r"bus error|Bus error|shared memory|/dev/shm|[^.\w]torch_\d+_",
        "there is not enough shared memory (/dev/shm) for the loader's workers: enlarge it, or "
        f"lower --num_workers (0 needs none); see {SHARED_MEMORY}",
    ),
    (
        r"DataLoader worker|Pin memory thread exited",
        "a worker that loads images was ended from outside, as when the machine's memory is full: "
        "lower --num_workers or --batch_size, or run again",
    ),
    (
        r"CUDA out of memory",
        "the GPU's memory is full: lower --batch_size, or --grad_checkpointing",
    ),
)


def explain(error: BaseException) -> str | None:
    """Return a sentence for an error of the surroundings (disk, files, memory); None for others."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    for one in chain:
        full = isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT)
        if full and "/dev/shm" not in str(one.filename):
            return _about_file(one, "the disk is full")
    text = "\n".join(str(one) for one in chain)
    if isinstance(error, (OSError, RuntimeError, EOFError, MemoryError)):
        for pattern, sentence in _SURROUNDINGS:
            if re.search(pattern, text):
                return sentence
        if "No space left on device" in text:
            return "the disk is full (No space left on device); files that were there are whole"
    if isinstance(error, MemoryError):
        return "the machine's memory is full: lower --num_workers or --batch_size"
    if isinstance(error, (ConnectionResetError, EOFError)):  # a worker's end seen by its pipe
        return dict(_SURROUNDINGS)[r"DataLoader worker|Pin memory thread exited"]
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.EIO, errno.EROFS)):
        return _about_file(error, "the system refuses a file")
    return None


def _about_file(error: OSError, what: str) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{what} ({place}{error.strerror}); files that were written before are whole"
