"""Which samples a step trains on, as a function of the step alone. Knows nothing of what they hold."""

from functools import lru_cache

import numpy as np

from worker.kernels.noise import permutation


class BatchOrder:
    """Endless epochs over ``num_samples``, each in an order of its own, cut into full batches.

    A batch may straddle epochs; every sample is seen once before any is seen again. Orders of other ``series`` are
    unrelated, so that two sets of equally many samples are not read in pairs.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, *, series: int = 0) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        # Two, because a batch across the border needs both.
        self._epoch_order = lru_cache(maxsize=2)(
            lambda epoch: permutation(num_samples, seed=seed, epoch=epoch, series=series).numpy()
        )

    def at(self, step: int) -> np.ndarray:
        """Positions in ``range(num_samples)`` of the batch of ``step``, counted from 0."""
        places = np.arange(self.batch_size, dtype=np.int64) + step * self.batch_size
        epochs = places // self.num_samples
        positions = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            positions[here] = self._epoch_order(int(epoch))[places[here] % self.num_samples]
        return positions

    @property
    def steps_per_epoch(self) -> int:
        """Steps that come closest to one pass over the data."""
        return max(1, round(self.num_samples / self.batch_size))
