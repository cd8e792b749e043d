"""Whether this process is one of several."""

import torch.distributed as dist


def in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def has_peers() -> bool:
    """Return whether other processes may wait for this one in a collective."""
    return in_group() and dist.get_world_size() > 1
