"""What may be asked of a family that Noisemill does not know: every pixel is normal, on its own."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from shared.specs.spec import Modality
from shared.specs.training import TrainSpec


class PixelGaussianSpec(TrainSpec):
    """Fit a mean and a deviation to each pixel."""

    modality: ClassVar[Modality] = "image"
    tasks: ClassVar[Mapping[str, frozenset[str]]] = {"generate": frozenset({"temperature"})}

    family: Literal["pixel_gaussian"]
    least_deviation: float = Field(default=0.01, gt=0, le=1)
    """Of a pixel, whose values are in [0, 1]."""

    def scores_on(self, data: Mapping[str, Any], info: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"log_density"})
