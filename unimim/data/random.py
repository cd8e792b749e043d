"""Make the random generators of samples: functions of seed, epoch and image index alone; and orders
of more images than an array of their numbers should hold."""

import numpy as np

# the purpose of a generator; without it, (seed, a) and (seed, a, 0) would be the same stream
_SAMPLE_STREAM, _ORDER_STREAM, _REPLACEMENT_STREAM, _PARTS_STREAM = range(4)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of everything random about image `index` in `epoch`.

    All three numbers are non-negative. Workers and ranks play no role.
    """
    return np.random.default_rng((seed, epoch, index, _SAMPLE_STREAM))


class ImplicitOrder:
    """A permutation of 0 ... n - 1 that holds eight numbers: `order[positions]` are those at the
    positions, int64.

    A Feistel network permutes the numbers of as few bits as hold n - 1; where the result is n or
    more it is applied again, so that whoever begins below n ends there, each at another number.
    """

    ROUNDS = 8  # an even number, after which both halves have the widths that they began with

    def __init__(self, n: int, rng: np.random.Generator):
        self.n = n
        self.keys = rng.integers(2**64, size=self.ROUNDS, dtype=np.uint64)
        bits = max(2, (n - 1).bit_length())
        self.widths = bits // 2, bits - bits // 2  # of the left and the right half

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        numbers = self._permuted(positions.astype(np.uint64))
        # fewer than half of all numbers are outside, so that few repetitions are needed
        while len(outside := np.flatnonzero(numbers >= self.n)):
            numbers[outside] = self._permuted(numbers[outside])
        return numbers.astype(np.int64)

    def _permuted(self, numbers: np.ndarray) -> np.ndarray:
        """Return where the network takes numbers of as many bits as both halves have."""
        left_bits, right_bits = (np.uint64(width) for width in self.widths)
        left, right = numbers >> right_bits, numbers & _ones(right_bits)
        for key in self.keys:
            left, right = right, left ^ (_mixed(right ^ key) & _ones(left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right


def _ones(bits: np.uint64) -> np.uint64:
    return np.uint64((1 << int(bits)) - 1)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return hashes of 64-bit numbers, by the finalizer of SplitMix64; products wrap around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
