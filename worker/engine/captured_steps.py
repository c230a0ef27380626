"""Training steps that are recorded once and repeated (``worker.engine.capture``): what of them a graph reads anew.

That is the batch, the number of the step, which keys the noise, and the learning rate, which each part has in its
place. Averages, figures and checkpoints are made outside. Knows no network and no loss.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from shared.specs.training import TrainSpec
from worker.engine.capture import CudaRecorder, Repeats
from worker.engine.numerics import Numerics
from worker.engine.team import Team
from worker.families.family import Batch
from worker.kernels.noise import Noise

STEP: Final = "step.number"
"""What it is called among the tensors of a batch."""


@dataclass(frozen=True)
class Kind:
    """What two steps have in common that Python decides alike."""

    parts: tuple[str, ...]
    """Those that are trained."""
    betas: tuple[float, float]
    decided: Hashable
    """What the losses make of the step's number (``TrainSpec.decided_by``)."""
    numerics: Numerics


class CapturedSteps:
    """The steps of one training, and the noise they draw."""

    def __init__(self, repeats: Repeats) -> None:
        self.repeats = repeats
        self._number: Tensor | None = None
        """Of the step that is being computed, on the device."""
        self._tells_number = False

    def advance(self, kind: Kind, batch: Batch, step: int, act: Callable[[Batch], Batch]) -> Batch:
        """``act`` on ``batch``, in one way or another; what it returns lasts until the next step."""
        if not self.repeats.is_on:
            return act(batch)
        device = next(iter(batch.values())).device

        def read(given: Batch) -> Batch:
            self._number, self._tells_number = given[STEP], kind.decided is not None
            try:
                return act({name: tensor for name, tensor in given.items() if name != STEP})
            finally:
                self._number = None

        number = torch.full((), step, dtype=torch.int64, device=device)
        return self.repeats.call(kind, {**batch, STEP: number}, read)

    def keyed(self, noise: Noise) -> Noise:
        """The same noise. In a graph the step's number is read when it is drawn, and is known in Python only where it
        tells kinds apart; a loss that asks for it all the same makes Python wait, and so no graph."""
        if self._number is None or not self.repeats.is_static:
            return noise
        step_B = self._number.expand_as(noise.index_B).clone()
        return replace(noise, step_B=step_B, known_step=noise.known_step if self._tells_number else None)


def captured_steps(spec: TrainSpec, numerics: Numerics, device: torch.device, team: Team) -> CapturedSteps:
    """What there can be of what ``spec`` asks for."""
    reasons = {
        "the device is no GPU": device.type != "cuda",
        "it has several devices": not team.is_alone,
        "in fp16 it is decided on the way whether a step is left out": numerics.precision == "fp16",
        "its blocks are to be compiled": spec.compiled_from is not None,
    }
    trouble = next((reason for reason, is_so in reasons.items() if is_so), None)
    if not spec.captured or trouble is not None:
        return CapturedSteps(Repeats(trouble=trouble if spec.captured else None))
    return CapturedSteps(Repeats(CudaRecorder(device)))
