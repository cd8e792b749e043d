"""How a model's class declares the command-line flags that set its options."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class RunFacts(NamedTuple):
    """What an option may depend on besides its flag.

    mean_std: what the run's images are normalized by, each a number for each color.
    """

    mean_std: tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Flag:
    """A flag of the pre-training script that sets an option of a method's constructor.

    Methods that share a flag list the same `Flag`. Where the script has a flag of that name
    already, because the data need it too, only `name`, `option`, `convert` and `optional` count.

    name: without the dashes.
    option: the constructor's name for it, by default the same.
    type, choices, default, metavar, help: as in `argparse`; the default None keeps the model's own.
    off: the name of the flag that switches it off; the flag is a switch then.
    convert: makes the option of the flag's value and the run's facts; None leaves the model's own.
    optional: models that do not list the flag ignore it; they refuse any other that is given.
    group: the title in --help; the names of the classes that list the flag, if it is empty.
    """

    name: str
    option: str = ""
    type: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    default: Any = None
    metavar: str | None = None
    help: str | None = None
    off: str = ""
    convert: Callable[[Any, RunFacts], Any] | None = None
    optional: bool = False
    group: str = ""

    def value(self, given: Any, facts: RunFacts) -> Any:
        """Return what the option gets when the flag is `given`; None: the model's own."""
        return given if given is None or self.convert is None else self.convert(given, facts)
