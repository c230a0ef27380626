"""What may be asked of the job that makes a model of files that another library has written."""

from pydantic import Field

from shared.specs.noising import Objective
from shared.specs.spec import DatasetId, ModelName, Spec


class ImportSpec(Spec):
    """Register the model in an uploaded folder of another library as a new version.

    What the folder tells of itself need not be given, and must not be contradicted.
    """

    dataset: DatasetId
    """The upload; it must be ready, and of modality ``model``."""
    model: ModelName
    """Name under which the model is registered; a new version each time."""
    family: str | None = Field(default=None, max_length=63)
    """The family that it becomes a model of; the only one that reads such files when left out."""
    objective: Objective | None = None
    """What the network predicts, where no scheduler in the folder says it (``diffusion`` only)."""
    num_classes: int | None = Field(default=None, ge=1, le=10_000)
    """Classes that the network knows, where it knows some: all of its class embeddings but the last, which stands for
    no class. Our own exports say it themselves (``diffusion`` only)."""
