"""How near a training's samples are to held-out images, in features that are shipped. Knows neither network nor job."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from torch import Tensor

from shared.specs.evaluate import usual_features
from worker.metrics import sets
from worker.metrics.features import FEATURES

NUM_DRAWN: Final = 256
"""Samples that one measurement draws: enough to tell states of one training apart, too few for a figure to publish."""
MOST_COMPARED: Final = 2048
"""Held-out images that they are compared to."""
BATCH_SIZE: Final = 16
"""Images that are described at once, on the CPU: the device's memory belongs to the training."""


class Nearness:
    """A distance between samples and the same images each time; nothing of it has to be in a checkpoint."""

    def __init__(self, metric: str, held_out_NCHW: Tensor) -> None:
        """``metric`` is one of ``shared.specs.training.NEARNESS``."""
        self._metric, self._held_out_NCHW = metric, held_out_NCHW
        self._features = replace(FEATURES[usual_features(held_out_NCHW.shape[1:])](), batch_size=BATCH_SIZE)
        self._reference_ND: Tensor | None = None

    def of(self, samples_NCHW: Tensor, on_batch: Callable[[], None]) -> dict[str, float]:
        """The figure by its name; ``on_batch`` is called now and then, and may raise."""
        if self._reference_ND is None:
            self._reference_ND = self._features.of(self._held_out_NCHW, on_batch=on_batch)
        described_ND = self._features.of(samples_NCHW, on_batch=on_batch)
        return sets.values(described_ND, self._reference_ND, [self._metric])

    def told(self) -> dict[str, Any]:
        """What the figure was measured with: as beside an evaluation's."""
        reference = sets.digest(self._held_out_NCHW)
        return {"num_samples": NUM_DRAWN, "features": self._features.digest, "reference": reference}
