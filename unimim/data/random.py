"""Random generators of samples: functions of seed, epoch and image, never of workers or ranks."""

import numpy as np

# what a generator is for: without it, (seed, a) and (seed, a, 0) would be the same stream
_SAMPLE_STREAM, _ORDER_STREAM, _REPLACEMENT_STREAM, _PARTS_STREAM = range(4)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The one generator of all randomness of image `index` in `epoch`; all three are
    non-negative."""
    return np.random.default_rng((seed, epoch, index, _SAMPLE_STREAM))
