"""Several sources in one run, in chosen proportions."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..errors import SimIPUError


class Mixture:
    """Which row of several joined sources stands at an index of an epoch: a pure function of (seed, epoch, index).

        mixture = Mixture(sizes=(7481, 500), weights=(1, 1))
        rows[mixture.row(epoch=0, index=17)]

    An epoch has as many indices as the sources have rows; a source has the share of them that its weight says. Over
    the epochs each source is gone through again and again in one shuffled order, so that its rows come equally often.

    Args:
        sizes: rows of each source, in the order in which they are joined.
        weights: of each source, greater than 0; only their ratios count.
        seed: of the orders.

    Attributes:
        shares: indices of an epoch that fall to each source.

    Raises:
        SimIPUError: another number of weights, or one that is not greater than 0.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int = 0) -> None:
        if len(weights) != len(sizes) or not all(0 < weight < float("inf") for weight in weights):
            raise SimIPUError(
                f"mixture: expected a weight greater than 0 for each of {len(sizes)} data sets, found {list(weights)}"
            )
        self.sizes, self.seed = tuple(sizes), seed
        ends = np.cumsum(weights) / np.sum(weights) * len(self)
        self._ends = ends.round().astype(int).tolist()  # of the sources' shares of an epoch
        self.shares = np.diff([0, *self._ends]).tolist()

    def __len__(self) -> int:
        return sum(self.sizes)

    def row(self, epoch: int, index: int) -> int:
        """Row of the joined sources, from 0 to `len(self) - 1`."""
        source = int(np.searchsorted(self._ends, index, side="right"))
        start, end = (0, *self._ends)[source], self._ends[source]
        size = self.sizes[source]
        place = (epoch * (end - start) + index - start) % size
        return sum(self.sizes[:source]) + int(_order(self.seed, source, size)[place])


@lru_cache(maxsize=64)
def _order(seed: int, source: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, source]).permutation(size)
