"""Make the random generators of samples: functions of seed, epoch and image index alone."""

import numpy as np

# the purpose of a generator; without it, (seed, a) and (seed, a, 0) would be the same stream
_SAMPLE_STREAM, _ORDER_STREAM, _REPLACEMENT_STREAM, _PARTS_STREAM = range(4)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of everything random about image `index` in `epoch`.

    All three numbers are non-negative. Workers and ranks play no role.
    """
    return np.random.default_rng((seed, epoch, index, _SAMPLE_STREAM))
