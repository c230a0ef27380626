"""How near a training's samples are to held-out images, in features that are shipped. Knows neither network nor job."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any, Final

import torch
from torch import Tensor

from shared.errors import NanLoss
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

    def __init__(self, metric: str, shape: Sequence[int], held_out: Callable[[], Iterable[Tensor]]) -> None:
        """``metric`` is one of ``shared.specs.training.NEARNESS``; ``held_out`` reads the images, bytes, part by part,
        which together are of ``shape`` ``(N, C, H, W)``. Only their features are kept: they may be gigabytes."""
        self._metric, self._shape, self._held_out = metric, shape, held_out
        self._features = replace(FEATURES[usual_features(shape[1:])](), batch_size=BATCH_SIZE)
        self._reference_ND: Tensor | None = None

    def of(self, samples_NCHW: Tensor, on_batch: Callable[[], None]) -> dict[str, float]:
        """The figure by its name; ``on_batch`` is called now and then, and may raise.

        Raises:
            NanLoss: it is no number.
        """
        if self._reference_ND is None:
            described = [self._features.of(image_BCHW, on_batch=on_batch) for image_BCHW in self._held_out()]
            self._reference_ND = torch.cat(described)
        described_ND = self._features.of(samples_NCHW, on_batch=on_batch)
        figures = sets.values(described_ND, self._reference_ND, [self._metric])
        if not all(map(isfinite, figures.values())):
            raise NanLoss(f"the {self._metric} to held-out images is no number")
        return figures

    def told(self) -> dict[str, Any]:
        """What the figure was measured with: as beside an evaluation's."""
        reference = sets.digest_of_parts((self._shape, self._held_out()))
        return {"num_samples": NUM_DRAWN, "features": self._features.digest, "reference": reference}
