"""What may be asked of the job that writes a trained model as files that another library opens."""

from typing import Literal

from shared.specs.spec import ModelRef, Spec

ExportFormat = Literal["diffusers"]


class ExportSpec(Spec):
    """Write a trained model as the files of another library, with a model card."""

    model: ModelRef
    """The version to export."""
    format: ExportFormat = "diffusers"
    """``diffusers``: a folder that its ``UNet2DModel.from_pretrained`` opens (UNets of family ``diffusion``), and a
    pipeline's where one draws from such a model."""
