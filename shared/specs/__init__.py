"""What a user may ask for. One file per family; the unions below are what the API publishes."""

from collections.abc import Mapping
from typing import Annotated, Final

from pydantic import Field

from shared.specs.consistency import ConsistencySpec
from shared.specs.diffusion import DiffusionSpec
from shared.specs.gan import GanSpec
from shared.specs.spec import Modality, Spec
from shared.specs.tasks import Generate, GenerateSpec, Interpolate, Reconstruct
from shared.specs.training import Precision, TrainSpec
from shared.specs.vae import VaeSpec
from shared.specs.vq import VqSpec

AnyTrainSpec = Annotated[VaeSpec | VqSpec | GanSpec | DiffusionSpec | ConsistencySpec, Field(discriminator="family")]
"""Union of all families' specs, told apart by ``family``."""

FAMILIES: Final[Mapping[str, type[TrainSpec]]] = {
    "vae": VaeSpec,
    "vq": VqSpec,
    "gan": GanSpec,
    "diffusion": DiffusionSpec,
    "consistency": ConsistencySpec,
}
"""Family name to the spec that trains it."""

__all__ = [
    "FAMILIES",
    "AnyTrainSpec",
    "ConsistencySpec",
    "DiffusionSpec",
    "GanSpec",
    "Generate",
    "GenerateSpec",
    "Interpolate",
    "Modality",
    "Precision",
    "Reconstruct",
    "Spec",
    "TrainSpec",
    "VaeSpec",
    "VqSpec",
]
