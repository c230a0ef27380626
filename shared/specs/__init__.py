"""What a user may ask for. One file per family; the unions below are what the API publishes."""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Final, Union

from pydantic import Field

from shared.specs import installed
from shared.specs.consistency import ConsistencySpec
from shared.specs.diffusion import DiffusionSpec
from shared.specs.gan import GanSpec
from shared.specs.spec import Modality, Spec
from shared.specs.style import StyleSpec
from shared.specs.tasks import Generate, GenerateSpec, Interpolate, Reconstruct
from shared.specs.training import Precision, TrainSpec
from shared.specs.translation import TranslationSpec
from shared.specs.vae import VaeSpec
from shared.specs.vq import VqSpec

_OWN: Final[Mapping[str, type[TrainSpec]]] = {
    "vae": VaeSpec,
    "vq": VqSpec,
    "gan": GanSpec,
    "diffusion": DiffusionSpec,
    "consistency": ConsistencySpec,
    "translation": TranslationSpec,
    "style": StyleSpec,
}

if TYPE_CHECKING:
    FAMILIES: Mapping[str, type[TrainSpec]]
    """Family name to the spec that trains it: ours, and those of installed packages."""
    AnyTrainSpec = Annotated[
        VaeSpec | VqSpec | GanSpec | DiffusionSpec | ConsistencySpec | TranslationSpec | StyleSpec,
        Field(discriminator="family"),
    ]
    """Union of all families' specs, told apart by ``family``."""
else:

    @cache
    def __getattr__(name: str) -> object:
        """Looked for when asked for: a package's spec imports this package before it can be registered."""
        if name == "FAMILIES":
            return {**_OWN, **installed.specs(_OWN)}
        if name == "AnyTrainSpec":
            return Annotated[Union[tuple(__getattr__("FAMILIES").values())], Field(discriminator="family")]  # noqa: UP007
        raise AttributeError(name)


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
    "StyleSpec",
    "TrainSpec",
    "TranslationSpec",
    "VaeSpec",
    "VqSpec",
]
