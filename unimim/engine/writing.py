"""Writes files in a thread, while training goes on."""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from unimim.errors import explain
from unimim.logs import log


def on_host(value: Any, copies: dict[tuple, Tensor] | None = None) -> Any:
    """Return a copy of nested dicts, lists and tuples with all tensors on the host.

    Training, which changes tensors in place, does not reach it. Names that share a tensor share
    its copy.
    """
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.dtype)
        key = (value.device, *place, value.shape, value.stride())
        if not value.numel():
            return value.detach().to("cpu", copy=True)
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {key: on_host(item, copies) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(item, copies) for item in value)
    return value


_NAME = "checkpoint"


def wait_for_writers(seconds: float) -> None:
    """Wait until all writers of this process have written what they began, at most so long."""
    for thread in threading.enumerate():
        if thread.name == _NAME and thread is not threading.current_thread():
            thread.join(seconds)


class Writer:
    """Writes one thing at a time in a thread.

    The interpreter waits for the thread before it ends. What goes wrong in it is raised by the next
    call of any method.
    """

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._what = ""

    def start(self, what: str, write: Callable[[], Any]) -> None:
        """Begin to write `what`, a file's name, by calling `write`, after what is being written."""
        self.wait()
        self._what = what
        self._thread = threading.Thread(target=self._run, args=(write,), name=_NAME)
        self._thread.start()

    def _run(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except BaseException as error:  # raised where the others notice
            self._error = error

    def check(self) -> None:
        """Raise what went wrong, if it is known already."""
        if self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written.

        ValueError: the operating system refused to write it.
        """
        if self._thread is None:
            return
        if self._thread.is_alive():
            log.debug("waiting for %s to be written", self._what)
        self._thread.join()
        self._thread = None
        error = self._error
        self._error = None
        if isinstance(error, OSError):
            reason = explain(error) or error.strerror or error
            raise ValueError(f"{self._what} cannot be written: {reason}") from error
        if error is not None:
            raise error
