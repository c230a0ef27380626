"""A diffusion model out of a folder of diffusers."""

from collections.abc import Mapping
from pathlib import Path

from shared.specs.diffusers_folder import WEIGHTS
from shared.specs.diffusion import DiffusionSpec
from worker.families.nets.denoiser import Denoiser
from worker.families.nets.diffusers_layout import fill_from_folder
from worker.families.nets.unet import UNet


def from_diffusers(files: Mapping[str, Path], spec: DiffusionSpec, net: Denoiser) -> None:
    """Fill the network, which is as ``DiffusionSpec.imported`` has told, with the folder's weights.

    Raises:
        ModelLoadFailed: they are not those of such a network.
    """
    if not isinstance(net.network, UNet):
        raise TypeError(f"a {spec.network} is no UNet2DModel")
    fill_from_folder(net.network, files[WEIGHTS])
