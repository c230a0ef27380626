"""The model families, by the name that ``spec.family`` has."""

from collections.abc import Mapping
from typing import Any, Final

from worker.families.consistency import FAMILY as CONSISTENCY
from worker.families.diffusion import FAMILY as DIFFUSION
from worker.families.family import Family
from worker.families.gan import FAMILY as GAN
from worker.families.vae import FAMILY as VAE
from worker.families.vq import FAMILY as VQ

FAMILIES: Final[Mapping[str, Family[Any, Any]]] = {
    "vae": VAE,
    "vq": VQ,
    "gan": GAN,
    "diffusion": DIFFUSION,
    "consistency": CONSISTENCY,
}
