"""Set up the logger that the whole project uses."""

import logging
import sys

log = logging.getLogger("unimim")


def setup_logging(rank: int) -> None:
    """Log to stdout: everything on rank 0, only errors on the other ranks."""
    handler = logging.StreamHandler(sys.stdout)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.propagate = False
