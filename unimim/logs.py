"""Set up the logger that the whole project uses."""

import io
import logging
import os
import sys

log = logging.getLogger("unimim")


def setup_logging(rank: int) -> None:
    """Log to stdout: everything on rank 0, only errors on the other ranks."""
    # None where it is closed; names of files may hold what the terminal's encoding does not
    stream = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (open until the end)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(stream)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.propagate = False
