"""What may be asked of the job that turns an upload into a canonical dataset."""

from pydantic import Field, model_validator

from shared.specs.spec import DatasetId, DatasetKind, Spec, wrong


class IngestSpec(Spec):
    """Read an upload, check it, and write the dataset that training maps into memory."""

    dataset: DatasetId
    """The dataset whose upload is read."""
    modality: DatasetKind | None = None
    """What the upload must hold; found out from its content when left out."""
    resolution: int | None = Field(default=None, ge=4, le=1024)
    """Side of the square every image is cropped and resized to, in pixels; images keep their most common size when
    left out."""

    @model_validator(mode="after")
    def _resolution_is_for_images(self) -> "IngestSpec":
        if self.resolution is not None and self.modality not in (None, "image"):
            raise wrong("resolution", f"resolution does not apply to {self.modality}")
        return self
