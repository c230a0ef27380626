"""What may be asked of the job that averages the weights of a finished training over another length."""

from typing import Final

from pydantic import Field

from shared.specs.spec import ModelName, ModelRef, Spec

AVERAGES: Final = "averages.safetensors"
"""The artifact of a training with ``ema: power`` that averages of other lengths are made of."""


class ReaverageSpec(Spec):
    """Make a new version of a model that was trained with ``ema: power``, without training it again."""

    model: ModelRef
    """The version that the training registered."""
    ema_length: float = Field(ge=0.05, le=0.25)
    """Length of the average, as a share of the training: ``sigma_rel`` of Karras et al. (2024)."""
    name: ModelName | None = None
    """Name under which the result is registered; that of ``model`` when left out."""
