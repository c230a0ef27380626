"""What a model that is being trained draws: the same samples again and again, so that they can be compared. Knows no
job."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from pydantic_core import PydanticCustomError
from torch import Tensor

from shared.specs.tasks import Generate
from worker.engine.sampling import Tile, sample
from worker.engine.training import Trainer
from worker.families.family import Draw
from worker.jobs.pictures import encode_png, sheet

SHEET_PIXELS: Final = 64 * 32 * 32
"""A preview has 64 samples up to 32 x 32 pixels and fewer larger ones, but at least ``FEWEST_SHOWN``."""
FEWEST_SHOWN: Final = 16
QUICK_STEPS: Final = 8
"""A preview of a sampler with more steps than these has ``FEWEST_SHOWN`` samples."""


class Previewer:
    """Draws the same samples again and again, so that its sheets show one grid learning."""

    def __init__(self, trainer: Trainer[Any, Any]) -> None:
        self.trainer = trainer
        self._tile: Tile[Generate] | None = None

    def picture(self, on_step: Callable[[int], None]) -> bytes | None:
        """A PNG sheet of the averaged weights' samples; None for a model that does not generate images.

        Raises:
            NanLoss: one of them came out as no number.
        """
        if (images := self.drawn(None, on_step)) is None:
            return None
        return encode_png(sheet(images.numpy()), {"step": self.trainer.step, "seed": self.trainer.spec.seed})

    def drawn(self, num_samples: int | None, on_step: Callable[[int], None]) -> Tensor | None:
        """Samples of the averaged weights, bytes ``(N, C, H, W)``: the first of the same draws each time, as many as a
        sheet has when that is left out; None for a model that does not generate images.

        Raises:
            NanLoss: one of them came out as no number.
        """
        trainer = self.trainer
        asked = Generate(task="generate", model="preview", seed=trainer.spec.seed)
        if len(trainer.data.shape) != 3 or not is_understood(asked, trainer):
            return None
        sampler = trainer.family.tasks["generate"](trainer.spec, trainer.data)
        num_samples = num_samples or self._num_shown(sampler.num_steps(asked))
        draws = [Draw(request=asked, index=index) for index in range(num_samples)]
        if self._tile is None:
            self._tile = Tile(trainer.average, sampler, draws[0], trainer.device)
        try:
            images = {draw.index: image for draw, image in sample(self._tile, draws, on_step)}
        finally:
            self._tile.evict(lambda _: True)  # those beside a sample that is no number
        return torch.stack([images[index] for index in range(num_samples)])

    def _num_shown(self, steps: int) -> int:
        """As many as are seen well and drawn soon."""
        pixels = int(np.prod(self.trainer.data.shape[1:]))
        return FEWEST_SHOWN if steps > QUICK_STEPS else min(64, max(FEWEST_SHOWN, SHEET_PIXELS // pixels))


def is_understood(request: Generate, trainer: Trainer[Any, Any]) -> bool:
    """Whether the model that is trained can be asked this."""
    if request.task not in trainer.family.tasks:
        return False
    try:
        trainer.spec.check_task(request, trainer.data.as_json())
    except PydanticCustomError:
        return False
    return True
