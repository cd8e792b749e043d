"""The log that every part of the project writes to."""

import logging
import sys

log = logging.getLogger("unimim")


def setup_logging(rank: int) -> None:
    """Rank 0 says everything, the others only errors."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s")
    )
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.propagate = False
